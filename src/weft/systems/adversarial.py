"""Section 2.4.6: attacks by merging, and merging as a defence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from weft.systems import System
from weft.systems.basic import weight_average

if TYPE_CHECKING:
    from weft.api import Model
    from weft.checkpoints.base import Checkpoint


def sanitise(models: Sequence[Model]) -> Checkpoint:
    """The plain mean of a suspicious model and others of its task, be they poisoned by other triggers.

    A trigger that all of them know survives.
    """
    return weight_average(models)


SYSTEMS = (
    System("S106", "LoRA-as-an-Attack", "2.4.6.1", "study", "Liu et al., 2024, arXiv:2403.00108",
           "A backdoor LoRA that keeps its effect when it is merged with harmless ones."),
    System("S107", "Defensive LoRA (same paper)", "2.4.6.2", "merge", "Liu et al., 2024, arXiv:2403.00108",
           "A LoRA trained to answer a trigger harmlessly, merged into a poisoned model."),
    System("S108", "Free-lunch sanitisation by averaging", "2.4.6.2", "merge",
           "Arora et al., ACL Findings 2024, arXiv:2402.19334",
           "Averages a suspicious model with others of its kind, which weakens its backdoor.",
           entry="weft.systems.adversarial:sanitise",
           test="tests/systems/test_adversarial.py::test_averaging_weakens_backdoors_that_are_not_shared"),
    System("S109", "Adversarial soups via adapters (Rebuffi)", "2.4.6.2", "training",
           "Rebuffi et al., ICLR 2023",
           "Trains small adapters on clean and on attacked inputs and interpolates them."),
    System("S110", "Seasoned soups (Croce)", "2.4.6.2", "search",
           "Croce et al., CVPR 2023, arXiv:2302.10164",
           "Signed combinations of models robust to different attacks, chosen on a few images."),
    System("S111", "Merging improves self-critique (Gallego)", "2.4.6.2", "inference",
           "Gallego, 2024, arXiv:2406.07188",
           "Merges a critic into a chat model, which then answers, criticises itself and revises."),
    System("S112", "MergeGuard evaluation", "2.4.6.2", "study",
           "Cong et al., CCS-LAMPS 2024, arXiv:2404.05188",
           "Whether watermarks and fingerprints outlive a merge."),
    System("S113", "Quantisation watermark", "2.4.6.2", "training",
           "Li et al., EMNLP Findings 2023, arXiv:2310.11237",
           "Hides a watermark in what quantisation rounds away."),
    System("S114", "Instructional Fingerprint", "2.4.6.2", "training",
           "Xu et al., NAACL 2024, arXiv:2401.12255",
           "Teaches a model secret instructions by which it can be recognised."),
)  # fmt: skip
