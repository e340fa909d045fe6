"""Section 2.4.4: federated learning."""

from __future__ import annotations

from weft.systems import System

SYSTEMS = (
    System("S89", "Centralised FL five-step loop", "2.4.4.1", "training", "McMahan et al., AISTATS 2017",
           "Initialise, broadcast, train locally, upload, aggregate; again."),
    System("S90", "FedAvg", "2.4.4.2", "training", "McMahan et al., AISTATS 2017, arXiv:1602.05629",
           "Averages the clients' models by the size of their data."),
    System("S91", "FedNova", "2.4.4.2", "training", "Wang et al., NeurIPS 2020, arXiv:2007.07481",
           "Normalises updates by the local work done before averaging."),
    System("S92", "FedAtt", "2.4.4.2", "training", "Ji et al., IJCNN 2019, arXiv:1812.07108",
           "Weighs clients, layer by layer, by a softmax over their distance from the server."),
    System("S93", "FedFisher", "2.4.4.2", "training", "Jhunjhunwala et al., AISTATS 2024",
           "One round: descends from the mean towards the Fisher-weighted consensus, and stops early."),
    System("S94", "PFNM", "2.4.4.2", "alignment", "Yurochkin et al., ICML 2019, arXiv:1905.12022",
           "Matches the clients' neurons under a Bayesian nonparametric model that may grow the layer.",
           entry="weft.align.growing:pfnm",
           test="tests/systems/test_clients_matched.py::test_pfnm_matches_clients_in_one_round_where_averaging_fails"),
    System("S95", "OTFusion", "2.4.4.2", "alignment", "Singh & Jaggi, NeurIPS 2020, arXiv:1910.05653",
           "Matches neurons by optimal transport, then averages.",
           entry="weft.align.transport:ot_fusion",
           test="tests/systems/test_matching.py::test_optimal_transport_fuses_networks_of_equal_and_unequal_widths"),
    System("S96", "FedMA", "2.4.4.2", "training", "Wang et al., ICLR 2020, arXiv:2002.06440",
           "Matches and averages one layer a round while the clients re-train those above.",
           entry="weft.align.growing:fedma",
           test="tests/systems/test_clients_matched.py::test_fedma_beats_as_many_rounds_of_averaging_and_matching_at_once"),
    System("S97", "GAMF", "2.4.4.2", "alignment", "Liu et al., ICML 2022",
           "Matches networks as graphs, all of them consistently, before averaging.",
           entry="weft.align.graphs:graph_matching",
           test="tests/systems/test_clients_matched.py::test_graphs_of_several_clients_are_matched_as_well_as_by_transport_to_one"),
)  # fmt: skip
