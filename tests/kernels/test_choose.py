"""Choosing tokens on a GPU: against the CPU's draw, and in float64 where rounding may decide."""

import numpy as np
import pytest
import torch

from nanoflow_compiler.engine.draw import ONE, Draw, draw
from nanoflow_compiler.engine.noise import log_arrivals, row_keys

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
CLOSE = 1e-5
"""Races closer than this, and sums of weights as close to a limit, relatively, may go either way."""


def choose(logits, settings):
    from nanoflow_compiler.kernels.choose import choose_tokens

    return choose_tokens(logits, settings)


def columns(rng, num_rows, *, num_tokens, **given):
    """Random settings on the CPU; those given are the same for all rows."""
    options = {
        "temperature": [0, 1e-5, 0.5, 1, 3, 100],
        "min_p": [0, 0, 0.01, 0.2, 1.0],
        "limit": [num_tokens, num_tokens, 1, 2, 50, num_tokens // 2 + 1, num_tokens - 1],
        "top_p": [1, 1, 1e-6, 0.3, 0.9, 0.999],
    }
    drawn = {name: rng.choice(some, num_rows) for name, some in options.items()}
    drawn |= {name: np.full(num_rows, value) for name, value in given.items()}
    with np.errstate(divide="ignore"):
        least = np.log(drawn["min_p"].astype(np.float32))
    seeds = rng.integers(0, 2**63, num_rows).astype(np.uint64)
    arrays = (
        drawn["temperature"].astype(np.float32),
        least,
        drawn["limit"].clip(1, num_tokens).astype(np.int64),
        drawn["top_p"].astype(np.float32).astype(np.float64),
        *row_keys(seeds, np.arange(num_rows).astype(np.uint64)),
    )
    return [torch.from_numpy(np.ascontiguousarray(array)) for array in arrays]


def there(own):
    return Draw(*(column.to(DEVICE) for column in own))


def expected_tokens(logits, own):
    """By the CPU, row by row in groups as the sampler makes them."""
    temperature, least, limit, top_p = own[:4]
    tokens = logits.argmax(-1)
    is_drawn = (temperature > 0) & (limit > 1)
    has_cut = (limit < logits.shape[1]) | (top_p < 1)
    groups = (
        (is_drawn & has_cut, logits.shape[1]),
        (is_drawn & ~has_cut & (least > -torch.inf), 0),
        (is_drawn & ~has_cut & (least == -torch.inf), None),
    )
    for chosen, num_ordered in groups:
        rows = chosen.nonzero()[:, 0]
        if len(rows):
            settings = Draw(*(column[rows, None] for column in own))
            tokens[rows] = draw(logits[rows], settings, num_ordered=num_ordered)
    return tokens


def is_possible(token, logits, own):
    """Whether a drawn row's token is right, but for roundings."""
    temperature, least, limit, top_p, low, high = own
    scaled = (logits - logits.max()) / temperature
    values = (
        scaled.double() - log_arrivals(low[None, None], high[None, None], num_tokens=len(logits))[0]
    )
    ordered = scaled.sort(descending=True).values
    weights = torch.where(ordered < least, 0, (ordered.double().exp() * ONE).floor())
    total = weights[:limit].sum()
    above = (weights.cumsum(0) - weights)[torch.searchsorted(-ordered, -scaled)]
    stays = (scaled >= least) & (scaled >= ordered[limit - 1])
    maybe, surely = (
        stays & ((top_p >= 1) | (above < top_p * total * (1 + error)) | (scaled == 0))
        for error in (CLOSE, -CLOSE)
    )
    return bool(maybe[token] & (values[token] >= values[surely].max() - CLOSE))


def check(logits, own):
    """Returns how many rows differ from the CPU's: all of them must be near misses."""
    found = choose(logits.to(DEVICE), there(own)).cpu()
    expected = expected_tokens(logits, own)
    differing = (found != expected).nonzero()[:, 0].tolist()
    for row in differing:
        settings = [column[row] for column in own]
        assert settings[0] > 0, (row, settings)
        assert settings[2] > 1, (row, settings)
        assert is_possible(found[row], logits[row], settings), (row, settings)
    return len(differing)


def random_logits(rng, num_rows, num_tokens, *, kind):
    generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
    logits = torch.randn(num_rows, num_tokens, generator=generator)
    match kind:
        case "tied":
            return (logits * 3).round()
        case "bfloat16":
            return (logits * 3).bfloat16().float()
        case "masked":
            logits[torch.rand(logits.shape, generator=generator) < 0.9] = -torch.inf
            logits[:, num_tokens // 2] = 0.5
            return logits * 2
        case "equal":
            return torch.zeros_like(logits)
        case _:
            return logits * float(kind)


KINDS = ("0.01", "2", "1000", "1e30", "tied", "bfloat16", "masked", "equal")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("num_rows", "num_tokens"), [(300, 1000), (37, 50_257), (12, 151_936), (1, 128_256), (9, 3)]
)
def test_tokens_are_those_of_the_cpu(num_rows, num_tokens, kind):
    rng = np.random.default_rng(num_tokens + len(kind))
    logits = random_logits(rng, num_rows, num_tokens, kind=kind)
    num_differing = check(logits, columns(rng, num_rows, num_tokens=num_tokens))
    assert num_differing <= 1 + num_rows // 50


@pytest.mark.parametrize("given", [{"limit": 30_000, "top_p": 0.9}, {"limit": 9000, "top_p": 1}])
def test_cuts_that_leave_many(given):
    """More than are settled together, and both limits far down."""
    rng = np.random.default_rng(1)
    for kind in ("0.001", "2", "tied"):
        logits = random_logits(rng, 6, 50_000, kind=kind)
        check(logits, columns(rng, 6, num_tokens=50_000, temperature=1, min_p=0, **given))


def test_a_row_alone_is_as_in_the_batch():
    rng = np.random.default_rng(2)
    logits = random_logits(rng, 1500, 5000, kind="2").to(DEVICE)
    own = columns(rng, 1500, num_tokens=5000)
    settings = there(own)
    together = choose(logits, settings)
    for size in (1, 70):
        for start in range(0, 210, size):
            part = slice(start, start + size)
            alone = there([column[part] for column in own])
            assert torch.equal(choose(logits[part], alone), together[part])


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1e30])
def test_memory_around_a_row_does_not_matter(poison):
    rng = np.random.default_rng(3)
    own = columns(rng, 40, num_tokens=4999)
    whole = torch.full((42, 5200), poison, device=DEVICE)
    logits = whole[1:41, 100:5099]
    logits.copy_(random_logits(rng, 40, 4999, kind="tied"))
    assert torch.equal(choose(logits, there(own)), choose(logits.clone(), there(own)))


def test_rows_without_a_number_harm_nobody():
    rng = np.random.default_rng(4)
    own = columns(rng, 40, num_tokens=3000)
    logits = random_logits(rng, 40, 3000, kind="2").to(DEVICE)
    good = choose(logits, there(own))
    for bad in (torch.nan, torch.inf, -torch.inf):
        spoilt = logits.clone()
        spoilt[::2] = bad
        found = choose(spoilt, there(own))
        assert torch.equal(found[1::2], good[1::2])
        assert ((found >= 0) & (found < 3000)).all()
        spoilt = logits.clone()
        spoilt[::2, 7] = bad
        found = choose(spoilt, there(own))
        assert torch.equal(found[1::2], good[1::2])
        assert ((found >= 0) & (found < 3000)).all()


def test_greedy_takes_the_first_of_equals():
    logits = torch.zeros(2, 130_000, device=DEVICE)
    logits[:, [4097, 5000, 129_999]] = 1.0
    rng = np.random.default_rng(5)
    for given in ({"temperature": 0}, {"limit": 1, "temperature": 1}):
        assert (
            choose(logits, there(columns(rng, 2, num_tokens=130_000, **given))).tolist()
            == [4097] * 2
        )


def test_no_rows():
    own = columns(np.random.default_rng(0), 0, num_tokens=10)
    assert choose(torch.empty(0, 10, device=DEVICE), there(own)).shape == (0,)


def test_a_captured_graph_serves_other_settings():
    rng = np.random.default_rng(6)
    logits = random_logits(rng, 64, 20_000, kind="2").to(DEVICE)
    greedy = there(columns(rng, 64, num_tokens=20_000, temperature=0))
    choose(logits, greedy)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tokens = choose(logits, greedy)
    names = ("temperature", "least", "limit", "top_p", "key_low", "key_high")
    for turn in range(4):
        settings = there(columns(rng, 64, num_tokens=20_000))
        logits.copy_(random_logits(rng, 64, 20_000, kind=KINDS[turn]))
        for name in names:
            getattr(greedy, name).copy_(getattr(settings, name))
        graph.replay()
        assert torch.equal(tokens, choose(logits, settings))


@pytest.mark.parametrize(
    "given", [{}, {"min_p": 0.2}, {"limit": 4}, {"top_p": 0.7}, {"temperature": 2.0}]
)
def test_tokens_follow_the_distribution(given):
    count, num_tokens = 40_000, 12
    rng = np.random.default_rng(7)
    plain = {"temperature": 1.0, "min_p": 0.0, "limit": num_tokens, "top_p": 1.0} | given
    row = random_logits(rng, 1, num_tokens, kind="2")
    own = columns(rng, count, num_tokens=num_tokens, **plain)
    found = choose(row.to(DEVICE).expand(count, -1), there(own)).cpu()
    p = (row[0].double() / plain["temperature"]).softmax(0)
    p[p < plain["min_p"] * p.max()] = 0
    order = p.argsort(descending=True)
    p[order[plain["limit"] :]] = 0
    p /= p.sum()
    p[order[(p[order].cumsum(0) - p[order]) >= plain["top_p"]]] = 0
    expected = (count * p / p.sum()).numpy()
    drawn = np.bincount(found, minlength=num_tokens)
    kept = expected > 0
    assert drawn[~kept].sum() == 0
    chi_square = ((drawn - expected)[kept] ** 2 / expected[kept]).sum()
    freedom = kept.sum() - 1
    assert chi_square < freedom + 5 * np.sqrt(2 * freedom)
