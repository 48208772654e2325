"""What models compute by themselves has a row's own bits: elementwise functions, products with routers and experts."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from worker.engine.cpu.kernels import kernels
from worker.engine.cpu.packing import pack
from worker.engine.cpu.stable_functions import StableFunctions
from worker.engine.cpu.stable_weight import StableWeight

FUNCTIONS = [torch.sigmoid, torch.tanh, functional.silu, functional.gelu, functional.softplus, torch.exp, torch.cos]
Product = Callable[[Tensor, Tensor], Tensor]
PRODUCTS: dict[str, Product] = {
    "linear": lambda x, weight: functional.linear(x, weight),
    "widened": lambda x, weight: functional.linear(x.float(), weight.float()),
    "matmul": lambda x, weight: x @ weight.t(),
    "addmm": lambda x, weight: torch.addmm(x.new_ones(len(weight)), x, weight.t()),
}


@pytest.fixture(autouse=True)
def three_threads() -> Iterator[None]:
    """Divide large tensors among threads, at places that no vector ends at."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_an_element_has_the_same_bits_anywhere_in_a_tensor(
    function: Callable[[Tensor], Tensor], dtype: torch.dtype
) -> None:
    x = (torch.randn(41_003, generator=torch.Generator().manual_seed(0)) * 4).to(dtype)
    with StableFunctions():
        whole = function(x)
        parts = torch.cat([function(part) for part in (x[:1], x[1:30], x[30:20_001], x[20_001:])])
    assert torch.equal(whole, parts)
    torch.testing.assert_close(whole, function(x))


@pytest.mark.skipif(kernels(torch.float32) is None, reason="no compiled kernels")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("product", PRODUCTS.values(), ids=PRODUCTS)
def test_a_product_with_a_parameter_has_the_same_bits_for_any_number_of_rows(
    product: Product, dtype: torch.dtype
) -> None:
    random = torch.Generator().manual_seed(0)
    x, plain = torch.randn(29, 64, generator=random).to(dtype), torch.randn(10, 64, generator=random).to(dtype)
    weight = StableWeight(plain)
    alone = torch.cat([product(x[row : row + 1], weight) for row in range(len(x))])
    for rows in (2, 7, 13, 29):
        assert torch.equal(product(x[:rows], weight), alone[:rows])
    torch.testing.assert_close(alone, product(x, plain), rtol=1e-2, atol=1e-1)


@pytest.mark.skipif(kernels(torch.float32) is None, reason="no compiled kernels")
def test_experts_that_are_stacked_in_one_parameter_have_products_of_their_own() -> None:
    random = torch.Generator().manual_seed(0)
    x, plain = torch.randn(3, 5, 64, generator=random), torch.randn(3, 64, 12, generator=random)
    weight = StableWeight(plain)
    found = torch.bmm(x, weight)
    torch.testing.assert_close(found, torch.bmm(x, plain), rtol=1e-4, atol=1e-4)
    assert torch.equal(found[1], x[1] @ weight[1])
    assert torch.equal(found[:, :1], torch.bmm(x[:, :1], weight))


@pytest.mark.skipif(kernels(torch.bfloat16) is None, reason="no compiled kernels")
def test_a_router_in_float32_stays_exact_in_a_bfloat16_model() -> None:
    layer = nn.Linear(64, 8, bias=False).requires_grad_(False)
    model = nn.ModuleDict({"mlp": nn.Linear(64, 64).requires_grad_(False).to(torch.bfloat16), "gate": layer})
    assert pack(model) == 2
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model["gate"](x), layer(x))
