"""Packed decoders: logits of stock transformers, one graph for any length, windows as models mean them."""

import itertools

import numpy as np
import pytest
import torch
import transformers as hf

from nanoflow_compiler import ops
from nanoflow_compiler.attention_plan import Visibility
from nanoflow_compiler.attention_state import AttentionState, StepLayout, attention_state
from nanoflow_compiler.errors import UnsupportedGraphError
from nanoflow_compiler.kv_cache import KVCache, LayerShape
from nanoflow_compiler.models.hf import PackedDecoder
from tiny_models import BUILDERS, SLIDING_WINDOW, VOCAB_SIZE, build, llama

PACKABLE = sorted(BUILDERS)
LENGTHS = (70, 1, 13)


def make_sequences(*lengths):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, VOCAB_SIZE, (n,), generator=generator) for n in lengths]


def pack(sequences):
    """Inputs of one step that has all tokens of all sequences; the first and last row of each."""
    lengths = np.array([len(tokens) for tokens in sequences])
    positions = torch.cat([torch.arange(n) for n in lengths])
    ends = np.cumsum(lengths)
    rows = torch.from_numpy(np.stack([ends - lengths, ends - 1], axis=1).ravel())
    return torch.cat(sequences), positions, rows


def whole_step(packed, sequences):
    lengths = np.array([len(tokens) for tokens in sequences])
    needed = -(-lengths // 64)
    tables = np.zeros((len(sequences), needed.max()), dtype=np.int64)
    for row, (start, count) in enumerate(zip(np.cumsum(needed) - needed, needed, strict=True)):
        tables[row, :count] = start + 1 + np.arange(count)
    layout = StepLayout.pack(
        query_lens=lengths, context_lens=np.zeros_like(lengths), block_tables=tables
    )
    cache = KVCache.allocate(packed.layers, num_blocks=int(needed.sum()) + 1)
    return attention_state(AttentionState(cache, (layout.part(0, int(lengths.sum())),)))


@torch.no_grad()
def run(step, packed, sequences):
    with whole_step(packed, sequences):
        return step(*pack(sequences))


@torch.no_grad()
def expected_logits(model, sequences):
    rows = [model(input_ids=tokens[None], use_cache=False).logits[0] for tokens in sequences]
    return torch.cat([logits[[0, -1]] for logits in rows]).float()


@pytest.mark.parametrize("name", PACKABLE)
def test_logits_equal_stock_and_one_graph_serves_every_length(name):
    model = BUILDERS[name]()
    packed = PackedDecoder(model, max_length=200)
    sequences = make_sequences(*LENGTHS)
    expected = expected_logits(model, sequences)
    actual = run(packed, packed, sequences)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    graphs = []

    def backend(module, _inputs):
        graphs.append(module)
        return module

    torch._dynamo.reset()
    step = torch.compile(packed, backend=backend, fullgraph=True, dynamic=True)
    torch.testing.assert_close(run(step, packed, sequences), expected, rtol=1e-4, atol=1e-5)
    shorter = [sequences[2], sequences[0][:9]]
    torch.testing.assert_close(
        run(step, packed, shorter), expected_logits(model, shorter), rtol=1e-4, atol=1e-5
    )
    assert len(graphs) == 1
    calls = [node for node in graphs[0].graph.nodes if node.target is ops.attention]
    assert [node.args[3] for node in calls] == [0, 1]


@pytest.mark.parametrize("name", ["llama", "gpt_oss"])
def test_ahead_of_time_autograd_takes_the_graph(name):
    packed = PackedDecoder(BUILDERS[name](), max_length=200)
    sequences = make_sequences(*LENGTHS)
    torch._dynamo.reset()
    step = torch.compile(packed, backend="aot_eager", fullgraph=True, dynamic=True)
    torch.testing.assert_close(
        run(step, packed, sequences), run(packed, packed, sequences), rtol=1e-4, atol=1e-5
    )


WINDOWS = {
    "llama": [0, 0],
    "mistral": [SLIDING_WINDOW] * 2,
    "starcoder2": [SLIDING_WINDOW] * 2,
    "gemma2": [SLIDING_WINDOW, 0],
    "gemma3": [SLIDING_WINDOW, 0],
    "cohere2": [SLIDING_WINDOW, 0],
    "gpt_oss": [SLIDING_WINDOW, 0],
}


def visibilities(packed):
    calls = [
        call
        for module in packed.modules()
        if hasattr(module, "nanoflow_calls")
        for call in module.nanoflow_calls
    ]
    return [Visibility(window, chunk) for _, window, chunk in sorted(calls)]


@pytest.mark.parametrize("name", WINDOWS)
def test_windows_are_what_the_masks_say(name):
    model = BUILDERS[name]()
    packed = PackedDecoder(model, max_length=200)
    assert visibilities(packed) == [Visibility(window=window) for window in WINDOWS[name]]
    # A window that no sequence fills limits nothing.
    short = PackedDecoder(model, max_length=SLIDING_WINDOW)
    assert visibilities(short) == [Visibility()] * 2


def llama4():
    return build(
        hf.Llama4TextConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=32,
            intermediate_size=24,
            intermediate_size_mlp=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            num_local_experts=2,
            interleave_moe_layer_step=2,
            attention_chunk_size=16,
            layer_types=["chunked_attention", "full_attention"],
            max_position_embeddings=256,
            pad_token_id=0,
        )
    )


def test_chunked_attention():
    model = llama4()
    packed = PackedDecoder(model, max_length=200)
    assert visibilities(packed) == [Visibility(chunk=16), Visibility()]
    sequences = make_sequences(*LENGTHS)
    torch.testing.assert_close(
        run(packed, packed, sequences), expected_logits(model, sequences), rtol=1e-4, atol=1e-5
    )


def test_layers_say_what_the_cache_must_hold():
    packed = PackedDecoder(BUILDERS["deepseek_v3"](), max_length=200)
    # Latent attention, expanded: keys of 8 + 4, values of 10.
    assert packed.layers == (LayerShape(4, 12, 10, torch.float32),) * 2
    assert packed.layers[0].bytes_per_token == 4 * 22 * 4


def test_the_model_is_left_as_it_was_and_shares_its_weights():
    model = BUILDERS["gpt_oss"]()
    before = (model.config._attn_implementation, model.config._experts_implementation)
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    packed = PackedDecoder(model, max_length=200)
    assert (model.config._attn_implementation, model.config._experts_implementation) == before
    assert attributes == {name: set(vars(module)) for name, module in model.named_modules()}
    pairs = zip(model.parameters(), packed.model.parameters(), strict=True)
    assert all(mine is theirs for mine, theirs in pairs)


LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 4,
    "long_factor": [1.0, 2.0, 3.0, 4.0],
    "original_max_position_embeddings": 32,
    "factor": 8.0,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}


@pytest.mark.parametrize(
    ("name", "rope", "changes"),
    [("phi3", LONGROPE, {"original_max_position_embeddings": 32}), ("llama", DYNAMIC, {})],
)
def test_rotary_embeddings_are_fixed_for_the_longest_sequence(name, rope, changes):
    longest = {"phi3": 256, "llama": 64}[name]
    model = BUILDERS[name](rope_parameters=rope, max_position_embeddings=longest, **changes)
    packed = PackedDecoder(model, max_length=100)
    long, short = make_sequences(100, 20)
    rows = torch.tensor([99])
    with torch.no_grad():
        expected = model(input_ids=long[None]).logits[0, -1:]
        with whole_step(packed, [long]):
            actual = packed(long, torch.arange(100), rows)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    # The short sequence does not depend on its long neighbour.
    together = run(packed, packed, [long, short])[2:]
    torch.testing.assert_close(together, run(packed, packed, [short]), rtol=1e-4, atol=1e-5)
    assert list(packed.parameters())


def test_the_choice_of_rotary_frequencies_follows_the_longest_sequence():
    changes = {"rope_parameters": LONGROPE, "original_max_position_embeddings": 32}
    model = BUILDERS["phi3"](**changes)
    (sequence,) = make_sequences(20)
    packed = PackedDecoder(model, max_length=30)
    torch.testing.assert_close(
        run(packed, packed, [sequence]), expected_logits(model, [sequence]), rtol=1e-4, atol=1e-5
    )


def t5():
    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    return hf.T5ForConditionalGeneration(hf.T5Config(vocab_size=VOCAB_SIZE, **sizes)).eval()


def mamba():
    return build(
        hf.MambaConfig(vocab_size=VOCAB_SIZE, hidden_size=16, num_hidden_layers=1, state_size=4)
    )


def bart():
    sizes = {"d_model": 16, "decoder_layers": 1, "decoder_attention_heads": 2}
    return hf.BartForCausalLM(
        hf.BartConfig(vocab_size=VOCAB_SIZE, is_encoder_decoder=False, **sizes)
    ).eval()


def bert():
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = hf.BertConfig(vocab_size=VOCAB_SIZE, intermediate_size=16, is_decoder=False, **sizes)
    return hf.BertLMHeadModel(config).eval()


def codegen():
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 4, "rotary_dim": 4}
    return build(hf.CodeGenConfig(vocab_size=VOCAB_SIZE, bos_token_id=1, eos_token_id=2, **sizes))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (t5, "encoder-decoder"),
        (mamba, "recurrent state"),
        (bart, "no position_ids"),
        (codegen, "computes attention itself"),
        (bert, "causal"),
    ],
)
def test_what_cannot_be_packed_is_refused(make, message):
    with pytest.raises(UnsupportedGraphError, match=message):
        PackedDecoder(make(), max_length=64)


def test_rows_that_scale_queries_are_refused_where_they_would():
    with pytest.raises(UnsupportedGraphError, match="attn_temperature_tuning"):
        PackedDecoder(llama4(), max_length=8192)


class OddExperts(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.has_gate = self.is_transposed = True

    def _apply_gate(self, gate_up):
        gate, up = gate_up.chunk(2, dim=-1)
        return gate.tanh() * up


def test_an_unknown_expert_activation_is_refused():
    model = llama()
    model.model.layers[0].mlp.odd = OddExperts()
    with pytest.raises(UnsupportedGraphError, match=r"layers\.0\.mlp\.odd"):
        PackedDecoder(model, max_length=64)


def test_calls_are_numbered_in_call_order_even_of_a_shared_module():
    model = llama()
    first, second = model.model.layers
    second.self_attn = first.self_attn
    packed = PackedDecoder(model, max_length=64)
    assert len(packed.layers) == 2
    sequences = make_sequences(9, 4)
    expected = expected_logits(model, sequences)
    for step in (packed, torch.compile(packed, backend="eager", fullgraph=True, dynamic=True)):
        for _ in range(2):
            torch.testing.assert_close(run(step, packed, sequences), expected, rtol=1e-4, atol=1e-5)


def test_prefill_in_pieces_equals_one_piece():
    packed = PackedDecoder(BUILDERS["gemma3"](), max_length=200)
    (sequence,) = make_sequences(90)
    table = np.array([[1, 2]])
    cache = KVCache.allocate(packed.layers, num_blocks=3)
    pieces = []
    with torch.no_grad():
        for start, end in itertools.pairwise([0, 1, 30, 64, 65, 90]):
            layout = StepLayout.pack(
                query_lens=np.array([end - start]),
                context_lens=np.array([start]),
                block_tables=table,
            )
            state = AttentionState(cache, (layout.part(0, end - start),))
            positions = torch.arange(start, end)
            with attention_state(state):
                pieces.append(packed(sequence[start:end], positions, positions - start))
        with whole_step(packed, [sequence]):
            whole = packed(sequence, torch.arange(90), torch.arange(90))
    torch.testing.assert_close(torch.cat(pieces), whole, rtol=1e-4, atol=1e-5)
