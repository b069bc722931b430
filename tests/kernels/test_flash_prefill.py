"""FlashInfer's kernel for prompts: what is brought to the device, and where the package is looked for."""

import importlib.metadata
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from nanoflow_compiler.attention_plan import Requests, Visibility
from nanoflow_compiler.attention_state import StepLayout
from nanoflow_compiler.kv_cache import HeadPages

pytest.importorskip("triton")  # the kernels' modules need it; no kernel runs here

from nanoflow_compiler.kernels import flash_prefill

pytestmark = pytest.mark.gpu
NAME = flash_prefill._NAME.format(dim=128)


def make_requests(counts, contexts):
    tables = np.arange(1, 1 + 5 * len(counts)).reshape(-1, 5)
    layout = StepLayout.pack(
        query_lens=np.array(counts), context_lens=np.array(contexts), block_tables=tables
    )
    return Requests.of(layout.part(0, sum(counts)))


def make_pages(dtype=torch.bfloat16, dim=128):
    pools = torch.zeros(3, 2, 64, dim, dtype=dtype)
    return HeadPages(pools, pools.clone())


@pytest.fixture(autouse=True)
def _gpu(monkeypatch):
    monkeypatch.setattr(flash_prefill, "current_sms", lambda _: 4)
    flash_prefill._kernel.cache_clear()
    yield
    flash_prefill._kernel.cache_clear()


@pytest.mark.parametrize(
    ("counts", "contexts"), [([200], [0]), ([1, 6, 130], [299, 64, 100]), ([1, 1], [3, 9])]
)
def test_arrays_fit_in_their_memory(counts, contexts):
    requests = make_requests(counts, contexts)
    tiles = flash_prefill.flash_with_room(
        make_pages(), num_heads=4, num_tokens=200, num_prompts=2, num_pages=10
    )
    for there, array in zip(tiles.tensors, tiles.arrays(requests), strict=True):
        assert array.dtype == np.int32
        assert there[: len(array)].shape == array.shape


def test_offsets_are_where_the_arrays_are():
    requests = make_requests([6, 130], [64, 100])
    pages = make_pages()
    with_room = flash_prefill.flash_with_room(
        pages, num_heads=4, num_tokens=200, num_prompts=2, num_pages=10
    )
    for tiles in (with_room, flash_prefill.plan_flash_prompts(requests, pages, num_heads=4)):
        begin = tiles.tensors[0].data_ptr()
        *places, requests_at, has_one_schedule = tiles.offsets
        rows = (0, 2, 3, 4, 5, 1, 6)  # tiles, rows, places, queries, keys, heads, ends
        assert places == [tiles.tensors[row].data_ptr() - begin for row in rows]
        assert (requests_at, has_one_schedule) == (0, False)


def test_a_query_between_others_is_brought_to_where_it_can_be_read():
    query = torch.randn(5, 3, 12, dtype=torch.bfloat16)
    assert flash_prefill._aligned(query[..., :8]).data_ptr() != query.data_ptr()
    torch.testing.assert_close(flash_prefill._aligned(query[..., :8]), query[..., :8])
    even = torch.randn(5, 3, 16, dtype=torch.bfloat16)[:, :2]
    assert flash_prefill._aligned(even) is even


def install(monkeypatch, folder, *, release="0.6.14", has_kernel=True):
    """A package that lies in ``folder``."""
    (folder / "flashinfer").mkdir()
    (folder / "flashinfer" / "__init__.py").write_text("raise ImportError")
    library = folder / "flashinfer" / "data" / "aot" / NAME / f"{NAME}.so"
    library.parent.mkdir(parents=True)
    if has_kernel:
        library.touch()
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setattr(flash_prefill, "version", lambda _: release)
    loader = SimpleNamespace(load_module=lambda path: SimpleNamespace(paged_run=path))
    monkeypatch.setitem(sys.modules, "tvm_ffi", loader)
    return str(library)


def test_what_was_compiled_ahead_is_found(monkeypatch, tmp_path):
    library = install(monkeypatch, tmp_path)
    assert flash_prefill._kernel(128) == library
    assert flash_prefill._kernel(64) is None


@pytest.mark.parametrize("wrong", [{"release": "0.6.13"}, {"has_kernel": False}])
def test_other_packages_are_not_used(monkeypatch, tmp_path, wrong):
    install(monkeypatch, tmp_path, **wrong)
    assert flash_prefill._kernel(128) is None


def test_without_the_package(monkeypatch):
    def version(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(flash_prefill, "version", version)
    assert flash_prefill._kernel(128) is None


def test_compiled_kernels_in_a_package_of_their_own(monkeypatch, tmp_path):
    install(monkeypatch, tmp_path, has_kernel=False)
    folder = tmp_path / "compiled"
    (folder / NAME).mkdir(parents=True)
    (folder / NAME / f"{NAME}.so").touch()
    (tmp_path / "flashinfer_jit_cache.py").write_text(
        f"def get_jit_cache_dir():\n    return {str(folder)!r}\n"
    )
    assert flash_prefill._kernel(128) == str(folder / NAME / f"{NAME}.so")
    sys.modules.pop("flashinfer_jit_cache")


@pytest.mark.parametrize(
    ("pages", "visibility"),
    [
        (make_pages(), Visibility()),  # not on a GPU
        (make_pages(dtype=torch.float16), Visibility()),
        (make_pages(dim=64), Visibility()),
        (make_pages(), Visibility(window=9)),
        (make_pages(), Visibility(chunk=9)),
    ],
)
def test_layers_that_it_does_not_serve(pages, visibility):
    assert flash_prefill.least_keys(pages, visibility=visibility) is None
