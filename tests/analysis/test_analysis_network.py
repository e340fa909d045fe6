"""A module as a function of its weights: forms of data, losses, derivatives."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from analysis_models import F64, Mlp, digits, trained
from torch import Tensor, nn
from torch.nn import functional as F

from weft.analysis.features import features, keep_only
from weft.analysis.network import Network, cross_entropy, error_rate, next_token
from weft.analysis.space import affine, at, flat, gram_of_states, mean, shaped
from weft.errors import DataError, UsageError


class Keywords(nn.Module):
    """Takes keywords and gives an object with logits, as transformers' models do."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.table.weight

    def forward(self, input_ids: Tensor, scale: Tensor) -> dict[str, Tensor]:
        return {"logits": self.head(self.table(input_ids) * scale[:, None, None])}


def test_losses_in_every_form_of_data_are_the_same_number() -> None:
    train, _ = digits()
    model = trained(1)
    with torch.no_grad():
        outputs = model(train[0])
        expected = float(F.cross_entropy(outputs.double(), train[1]))
        wrong = float((outputs.argmax(1) != train[1]).double().mean())
    pairs = list(zip(train[0].split(500), train[1].split(500), strict=True))
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*train), batch_size=333)
    for data in (train, pairs, loader):
        net = Network(model, data, batch_size=500)
        found = net.measure(net.state(model))
        assert found.loss == pytest.approx(expected, rel=1e-5)
        assert found.error == pytest.approx(wrong, abs=1e-12)
        assert net.examples == 1200


def test_keywords_labels_ignored_targets_and_tied_weights() -> None:
    torch.manual_seed(0)
    model = Keywords()
    ids = torch.randint(11, (5, 7))
    labels = ids.roll(-1, 1)
    labels[:, 4:] = -100
    batch = {"input_ids": ids, "scale": torch.rand(5), "labels": labels}
    net = Network(model, [batch])
    assert net.parameters == ["table.weight"] and net.examples == 20
    state = net.state(model)
    assert list(state) == ["table.weight"]
    with torch.no_grad():
        expected = F.cross_entropy(
            model(ids, batch["scale"])["logits"][:, :4].reshape(-1, 11), labels[:, :4].reshape(-1)
        )
    assert net.measure(state).loss == pytest.approx(float(expected), rel=1e-6)
    moved = net.measure(affine([2.0], [state])).loss
    assert moved == pytest.approx(
        net.measure(net.state({"table.weight": 2 * model.table.weight.detach()})).loss
    )


def test_named_losses() -> None:
    outputs = torch.randn(2, 4, 5, dtype=F64)
    targets = torch.tensor([[1, 2, 3, -100], [0, 0, 4, 4]])
    logp = outputs.log_softmax(-1)
    by_hand = [-logp[i, j, targets[i, j]] for i in range(2) for j in range(4) if targets[i, j] >= 0]
    assert float(cross_entropy(outputs, targets)) == pytest.approx(float(sum(by_hand)) / 7)
    later = [-logp[i, j, targets[i, j + 1]] for i in range(2) for j in range(3) if targets[i, j + 1] >= 0]
    assert float(next_token(outputs, targets)) == pytest.approx(float(sum(later)) / 5)
    wrong = [
        int(outputs[i, j].argmax()) != int(targets[i, j])
        for i in range(2)
        for j in range(4)
        if targets[i, j] >= 0
    ]
    assert float(error_rate(outputs, targets)) == pytest.approx(sum(wrong) / 7)


def test_gradient_and_hessian_product_agree_with_autograd_over_uneven_batches() -> None:
    model = Mlp((3, 4, 2), 0).double()
    model.layers[0].weight.data.mul_(0.7)
    x, y = torch.randn(9, 3, dtype=F64), torch.randint(2, (9,))
    net = Network(model, [(x[:5], y[:5]), (x[5:], y[5:])])
    state = net.state(model)
    vector = flat(state, net.parameters)

    def loss(v: Tensor) -> Tensor:
        return F.cross_entropy(torch.func.functional_call(model, shaped(v, state, net.parameters), (x,)), y)

    value, gradient = net.loss_and_gradient(state)
    assert value == pytest.approx(float(loss(vector)))
    torch.testing.assert_close(flat(gradient, net.parameters), torch.func.grad(loss)(vector))
    hessian = torch.func.hessian(loss)(vector)
    direction = torch.randn_like(vector)
    product = net.hessian_product(state, shaped(direction, state, net.parameters))
    torch.testing.assert_close(flat(product, net.parameters), hessian @ direction)


def test_second_derivatives_go_through_attention() -> None:
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, dtype=F64).eval()
    x, y = torch.randn(2, 3, 8, dtype=F64), torch.randn(2, 3, 8, dtype=F64)
    net = Network(model, (x, y), loss="mse")
    state = net.state(model)
    vector = flat(state, net.parameters)
    direction = torch.randn_like(vector)
    product = flat(net.hessian_product(state, shaped(direction, state, net.parameters)), net.parameters)

    def slope(step: float) -> Tensor:
        return flat(
            net.loss_and_gradient(at(vector + step * direction, state, net.parameters))[1], net.parameters
        )

    torch.testing.assert_close(product, (slope(1e-5) - slope(-1e-5)) / 2e-5, rtol=1e-4, atol=1e-7)


def test_the_given_module_is_never_changed() -> None:
    train, _ = digits()
    model = trained(3, 32, True).train()
    before = deepcopy(model.state_dict())
    net = Network(model, train)
    net.settled(mean([net.state(model), net.state(trained(1, 32, True))]))
    net.loss_and_gradient(net.state(model))
    assert model.training and all(p.requires_grad for p in model.parameters())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    model.eval()


def test_mixtures_are_exact_and_carry_integers() -> None:
    a, b = (
        {"w": torch.tensor([1.0, 2.0]), "n": torch.tensor(3)},
        {"w": torch.tensor([5.0, -2.0]), "n": torch.tensor(9)},
    )
    made = affine([0.25, 0.75], [a, b])
    assert made["w"].tolist() == [4.0, -1.0] and made["n"] == 3
    assert affine([1.0, 0.0], [a, {"w": torch.tensor([float("inf"), 0]), "n": b["n"]}])["w"].tolist() == [
        1.0,
        2.0,
    ]
    torch.testing.assert_close(
        gram_of_states([a, b], ["w"]), torch.tensor([[5.0, 1.0], [1.0, 29.0]], dtype=F64)
    )
    with pytest.raises(UsageError, match="1 coefficients for 2"):
        affine([1.0], [a, b])


def test_features_are_what_layers_see_after_activation() -> None:
    train, _ = digits()
    model = trained(1)
    net = Network(model, train, batch_size=500)
    found = features(net, net.state(model))
    assert list(found) == ["layers.0", "layers.1", "layers.2", "output"]
    with torch.no_grad():
        hidden = model.layers[0](train[0]).relu()
        torch.testing.assert_close(found["layers.1"], hidden)
        torch.testing.assert_close(found["output"], model(train[0]))
    assert list(features(net, net.state(model), keep_only(net, net.state(model), ["layers.1"]))) == [
        "layers.1",
        "output",
    ]
    with pytest.raises(UsageError, match=r"did you mean 'layers\.1'"):
        keep_only(net, net.state(model), ["layer.1"])
    huge = affine([1e38], [net.state(model)])
    with pytest.raises(DataError, match=r"features at layers\.\d are NaN or infinite"):
        features(net, huge)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ((torch.zeros(3, 64), torch.zeros(2).long()), "3 inputs and 2 targets"),
        ((torch.zeros(0, 64), torch.zeros(0).long()), "no examples"),
        ([], "no examples"),
        (torch.zeros(3, 64), "inputs, targets"),
        ([torch.zeros(3, 64)], "a batch must be"),
    ],
)
def test_data_that_cannot_be_meant(data: object, message: str) -> None:
    with pytest.raises((UsageError, DataError), match=message):
        Network(trained(1), data)


def test_an_unknown_loss_a_module_without_weights_and_outputs_that_are_no_tensor() -> None:
    train, _ = digits()
    with pytest.raises(UsageError, match="did you mean 'cross_entropy'"):
        Network(trained(1), train, loss="crossentropy")
    with pytest.raises(UsageError, match="no parameters"):
        Network(nn.ReLU(), train)

    class Odd(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            return "no"  # type: ignore[return-value]

    net = Network(Odd((64, 10), 0), train)
    with pytest.raises(UsageError, match="gives str"):
        net.measure(net.state(Odd((64, 10), 0)))


def test_a_language_model_of_transformers_from_loss_to_second_derivatives() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=17, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).double()
    ids = torch.randint(17, (3, 6))
    net = Network(model, [{"input_ids": ids, "labels": ids}], loss="next_token")
    state = net.state(model)
    assert "lm_head.weight" not in state
    with torch.no_grad():
        expected = model(input_ids=ids, labels=ids).loss
    assert net.measure(state).loss == pytest.approx(float(expected), rel=1e-5)
    vector = flat(state, net.parameters)
    direction = torch.randn_like(vector)
    product = flat(net.hessian_product(state, shaped(direction, state, net.parameters)), net.parameters)

    def slope(step: float) -> Tensor:
        return flat(
            net.loss_and_gradient(at(vector + step * direction, state, net.parameters))[1], net.parameters
        )

    # the config's own float32 places keep the finite difference from more digits
    error = (product - (slope(1e-4) - slope(-1e-4)) / 2e-4).norm() / product.norm()
    assert float(error) < 1e-2
    seen = features(net, state)
    assert "model.layers.0.self_attn.q_proj" in seen and "model.layers.0.self_attn.k_proj" not in seen
    assert list(seen)[-1] == "output"
