"""Tiny models whose weights tell every part from the others, and the block of the design computed with plain loops."""

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from olmem import OlmemConfig, OlmemForCausalLM
from olmem.visibility_olmem import Visibility
from torch import nn

WINDOW = 4
# Two kinds of layers with a theta each, grouped heads, and heads that are wider together than the residual stream.
TINY: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 32,
    "layer_types": ["sliding_attention", "full_attention"],
    "sliding_window": WINDOW,
    "rope_parameters": {"sliding_attention": {"rope_theta": 50.0}, "full_attention": {"rope_theta": 1000.0}},
    "initializer_range": 0.1,
}
FULL, SLIDING, CHUNKED = "full_attention", "sliding_attention", "chunked_attention"
ROPE = {FULL: {"rope_theta": 1000.0}, SLIDING: {"rope_theta": 50.0}, CHUNKED: {"rope_theta": 20.0}}
# What no cache of Transformers serves: sinks before windows, windows that step, and both with everything else.
SINKS: dict[str, Any] = {"layer_types": SLIDING, "num_sink_tokens": 2, "rope_parameters": ROPE}
CHUNKS: dict[str, Any] = {
    "layer_types": CHUNKED,
    "attention_chunk_size": 3,
    "attention_chunk_lookback": 1,
    "rope_parameters": ROPE,
}
MIXED: dict[str, Any] = CHUNKS | {
    "num_hidden_layers": 3,
    "layer_types": [SLIDING, CHUNKED, FULL],
    "num_sink_tokens": 3,
    "sliding_window": 3,
}
# Values that are the keys, in one cached tensor; and positions that are no rotations, or not only.
ONE_TENSOR: dict[str, Any] = MIXED | {"shared_projections": "key_value"}
SCHEMES: dict[str, Any] = MIXED | {"position_embedding": ["xpos", "linspace", "none"]}
SINK_LOGITS: dict[str, Any] = {"sink_logit_init": 0.0}  # learned sinks
STREAMS = {
    "window": {"layer_types": SLIDING},
    "sinks": SINKS,
    "chunks": CHUNKS,
    "mixed": MIXED,
    "one tensor": ONE_TENSOR,
    "schemes, learned sinks": SCHEMES | SINK_LOGITS,
}
# What is carried on beyond windows and sinks. No segment is a whole number of windows, and the stores are soon full.
MEMORY: dict[str, Any] = {"num_memory_tokens": 2, "memory_segment_length": 5}
RETRIEVAL: dict[str, Any] = {"retrieval_layers": [0, 1], "retrieval_top_k": 2, "retrieval_capacity": 7}
BOTH: dict[str, Any] = MEMORY | RETRIEVAL
LEARNED: dict[str, Any] = {"retrieval_admission": "learned"}  # a store that selects
MEMORIES: dict[str, dict[str, Any]] = {
    "memory": STREAMS["window"] | MEMORY,
    "memory beside full layers": MEMORY,
    "retrieval": STREAMS["window"] | RETRIEVAL,
    "both": STREAMS["window"] | BOTH,
    "both with sinks": SINKS | BOTH,
    "both in chunks": CHUNKS | BOTH,
    "both mixed": MIXED | BOTH | LEARNED | SINK_LOGITS,
    "both in one tensor": ONE_TENSOR | BOTH | LEARNED,
    "both by schemes": SCHEMES | BOTH,
}


def named(value: Any) -> str:
    """A parameter's name in a test's."""
    return next((name for name, changes in (STREAMS | MEMORIES).items() if changes is value), str(value))


def tiny(model_class: Any = OlmemForCausalLM, **changes) -> Any:
    """A tiny model of that class, in evaluation mode, its weights a function of its parameters' shapes."""
    return shake(model_class(OlmemConfig(**(TINY | changes))))


def shake(model: nn.Module) -> Any:
    """Draws every weight and bias anew, norms too: as long as these are ones, two swapped norms look the same.

    The norm of memory is drawn around 3, so that what the layers add to a memory is small beside it. Around 1 these
    random weights make a chaotic recurrence, which multiplies a rounding error from segment to segment until it is as
    large as the logits.
    """
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        centre = 1.0 if parameter.ndim == 1 and (parameter == 1).all() else 0.0
        centre *= 3.0 if "memory.norm" in name else 1.0
        nn.init.normal_(parameter, centre, 0.25, generator=generator)
    return model.eval()


def tokens(*shape: int, vocab_size: int = 61, seed: int = 0) -> torch.Tensor:
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def span(model: OlmemForCausalLM) -> int:
    """Tokens of the widest window that has an end."""
    return max(Visibility.of(model.config, kind).span or 1 for kind in model.config.layer_types)


def left_padded(*rows: torch.Tensor, pad: int = 0) -> dict[str, torch.Tensor]:
    """Rows of ids as one batch with its attention mask."""
    width = max(len(row) for row in rows)
    ids = [nn.functional.pad(row, (width - len(row), 0), value=pad) for row in rows]
    masks = [nn.functional.pad(torch.ones_like(row), (width - len(row), 0)) for row in rows]
    return {"input_ids": torch.stack(ids), "attention_mask": torch.stack(masks)}


def seen_by(
    query: int, layer_type: str, window: int = 0, chunk: int = 0, lookback: int = 0, sinks: int = 0
) -> tuple[list[int], list[int]]:
    """The sinks before a query's window, and its window, token by token from the table of section 1 of the design.
    Both together are the list whose places are the slots."""
    before, inside = [], []
    for key in range(query + 1):
        if (
            layer_type == "full_attention"
            or (layer_type == "sliding_attention" and query - window < key)
            or (layer_type == "chunked_attention" and chunk * (query // chunk - lookback) <= key)
        ):
            inside.append(key)
        elif key < sinks:
            before.append(key)
    return before, inside


Role = Literal["read", "token", "write"]


@dataclass(eq=False)
class States:
    """What one layer makes of one token, read token or write token: an entry for each head, without positions."""

    number: int
    queries: list[torch.Tensor]
    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    scores: list[torch.Tensor] = field(default_factory=list)  # by which a store selects
    placed: dict[Any, torch.Tensor] = field(default_factory=dict)  # those that have been given a position


@dataclass
class Layer:
    """What one layer of the oracle goes by, and all that it remembers."""

    index: int
    kind: str
    scheme: str
    retrieves: bool
    tokens: list[States] = field(default_factory=list)  # of the whole stream
    memory: list[States] = field(default_factory=list)  # of the running segment's read tokens

    @property
    def name(self) -> str:
        return f"model.layers.{self.index}"


def weights_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """A model's weights in float64 by name, for the oracle to be differentiated by them."""
    return {name: tensor.detach().double().requires_grad_() for name, tensor in model.named_parameters()}


def oracle(
    model: OlmemForCausalLM,
    ids: torch.Tensor,
    kept: float = 1.0,
    attention_kept: float = 1.0,
    attentions: list[torch.Tensor] | None = None,
    weights: dict[str, torch.Tensor] | None = None,
    gaps: list[float] | None = None,
) -> torch.Tensor:
    """Logits (T, vocab_size) of ids (T,) by sections 1, 2 and 3 of the design, one token and one head at a time, in
    float64: every query lists the keys it sees and numbers them anew, 0, 1, 2 …, before they are rotated.

    Reads the configuration and the state dict, or the `weights` that stand in for it, nothing else. `kept` and
    `attention_kept` multiply what residual and attention dropout would thin out. `attentions` is given the weights
    (H, T, T) of every layer. `gaps` is given, of every retrieval that leaves candidates out, by how much the last one
    chosen is better than the best one that would have made a difference: below 1e-5 a float32 may choose otherwise. It
    is given the same of every store that leaves out tokens by their scores, unless these are equal.
    """
    config = model.config
    if weights is None:
        weights = {name: tensor.double() for name, tensor in model.state_dict().items()}
    heads, kv_heads, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim

    def linear(name: str, x: torch.Tensor) -> torch.Tensor:
        return weights[f"{name}.weight"] @ x + weights.get(f"{name}.bias", 0)

    def norm(name: str, x: torch.Tensor) -> torch.Tensor:
        if config.norm_type != "rms":
            x = x - x.mean()
        x = x / (x.pow(2).mean() + config.rms_norm_eps).sqrt()
        return (
            x if config.norm_type == "layer_plain" else x * weights[f"{name}.weight"] + weights.get(f"{name}.bias", 0)
        )

    def clip(stage: str, x: torch.Tensor) -> torch.Tensor:
        return (
            x
            if config.clip_qkv is None or config.clip_qkv_stage != stage
            else x.clip(-config.clip_qkv, config.clip_qkv)
        )

    def rotate(x: torch.Tensor, position: int, layer_type: str) -> torch.Tensor:
        rope, half = config.rope_parameters[layer_type], size // 2
        theta, factor = rope["rope_theta"], rope.get("factor", 1.0)
        if rope["rope_type"] == "dynamic":  # of a text that ends there
            length, trained = max(position + 1, config.max_position_embeddings), config.max_position_embeddings
            theta, factor = theta * (factor * length / trained - (factor - 1)) ** (size / (size - 2)), 1.0
        angles = [position / factor * theta ** (-2 * k / size) for k in range(half)]
        cos, sin = (x.new_tensor([function(angle) for angle in angles]) for function in (math.cos, math.sin))
        return torch.cat((x[:half] * cos - x[half:] * sin, x[half:] * cos + x[:half] * sin))

    def scaled(x: torch.Tensor, distance: float) -> torch.Tensor:
        """xpos: each pair of dimensions by its ζ to the power of distance / 512."""
        zeta = [(2 * k / size + 0.4) / 1.4 for k in range(size // 2)] * 2
        return x * torch.tensor([base ** (distance / 512) for base in zeta], dtype=x.dtype)

    def project(prefix: str, letter: str, x: torch.Tensor) -> list[torch.Tensor]:
        """Queries, keys or values of one token, one for each head, without a position."""
        shared = config.shared_projections
        if letter == "q" and shared in ("query_key", "query_key_value"):
            return project(prefix, "k", x)
        if letter == "v" and shared in ("key_value", "query_key_value"):
            return project(prefix, "k", x)
        if letter == "v" and shared == "value_difference":
            return [q - k for q, k in zip(project(prefix, "q", x), project(prefix, "k", x), strict=True)]
        name = f"{prefix}.{letter}_proj"
        x = clip("projection", linear(name, x))
        qk_norm = "none" if letter == "v" else config.qk_norm
        norm_name = name.replace("_proj", "_norm")
        x = norm(norm_name, x) if qk_norm == "full" else x
        split = [x[start : start + size] for start in range(0, len(x), size)]
        return [norm(norm_name, head) for head in split] if qk_norm == "head" else split

    def softmax(scores: list[torch.Tensor], prefix: str, head: int) -> torch.Tensor:
        """The share of each score, and none for the head's learned sink, which is one more of them if there is one."""
        if config.sink_logit_init is None:
            return torch.stack(scores).softmax(0)
        return torch.stack([*scores, weights[f"{prefix}.sinks"][head]]).softmax(0)[:-1]

    clips_rotated = config.clip_qkv is not None and config.clip_qkv_stage == "rotary"

    def place(layer: Layer, letter: str, states: States, head: int, slot: int) -> torch.Tensor:
        """A query or a key at its slot."""
        slot = states.number if clips_rotated else slot  # a clip is of vectors rotated at their own index
        at = (letter, head, slot)
        if at not in states.placed:
            x = (states.queries if letter == "q" else states.keys)[head]
            if layer.scheme in ("rope", "xpos"):
                x = rotate(x, slot, layer.kind)
            if layer.scheme == "xpos":
                x = scaled(x, slot if letter == "q" else -slot)
            if layer.scheme == "linspace" and letter == "k":
                span = {
                    FULL: config.max_position_embeddings,
                    SLIDING: config.sliding_window,
                    CHUNKED: (config.attention_chunk_size or 0) * (config.attention_chunk_lookback + 1),
                }[layer.kind]
                x = x + 0.1 * slot / max(span - 1, 1) * weights[f"{layer.name}.self_attn.linspace_scale"]
            states.placed[at] = clip("rotary", x)
        return states.placed[at]

    def retrieve(layer: Layer, query: torch.Tensor, shared: int, start: int) -> torch.Tensor | None:
        """What a head's query finds among the tokens that have left its window; None if none has."""
        candidates = [layer.tokens[j] for j in range(config.num_sink_tokens, start)]
        if not candidates:
            return None
        learned, capacity = config.retrieval_admission == "learned", config.retrieval_capacity
        if learned:
            candidates.sort(key=lambda states: (float(states.scores[shared].detach()), states.number))
        refused, candidates = candidates[:-capacity], candidates[-capacity:]
        if learned and refused and gaps is not None:
            gap = float((candidates[0].scores[shared] - refused[-1].scores[shared]).detach())
            gaps.append(gap or 1.0)
        scores = torch.stack([query @ states.keys[shared] / math.sqrt(size) for states in candidates])
        if learned:
            scores = scores + torch.stack([states.scores[shared] for states in candidates])
        order = sorted(range(len(candidates)), key=lambda place: -float(scores[place].detach()))
        chosen, others = order[: config.retrieval_top_k], order[config.retrieval_top_k :]
        last = candidates[chosen[-1]]
        for place in others:
            same = torch.equal(candidates[place].keys[shared], last.keys[shared])
            if gaps is not None and not (same and torch.equal(candidates[place].values[shared], last.values[shared])):
                gaps.append(float((scores[chosen[-1]] - scores[place]).detach()))
                break
        shares = scores[chosen].softmax(0)
        found = [share * candidates[place].values[shared] for place, share in zip(chosen, shares, strict=True)]
        return torch.stack(found).sum(0)

    def attention(layer: Layer, role: Role, number: int, group: list[torch.Tensor]) -> list[torch.Tensor]:
        """Of one token, or of all read or write tokens together; `number` is that of the last token so far."""
        prefix = f"{layer.name}.self_attn"
        new = []
        for x in group:
            query, key, value = (project(prefix, letter, x) for letter in "qkv")
            scores = []
            if layer.retrieves and config.retrieval_admission == "learned":
                scores = list(linear(f"{prefix}.retrieval_score", x))
            new.append(States(number, query, key, value, scores))
        before, inside = [], []
        if role == "read":
            listed = layer.memory = new
        else:
            layer.tokens += new if role == "token" else []
            before, inside = seen_by(
                number,
                layer.kind,
                config.sliding_window or 0,
                config.attention_chunk_size or 0,
                config.attention_chunk_lookback,
                config.num_sink_tokens,
            )
            listed = layer.memory + [layer.tokens[j] for j in before + inside] + (new if role == "write" else [])
        outputs = []
        for states in new:
            mixed = []
            for head in range(heads):
                shared = head // (heads // kv_heads)
                query = place(layer, "q", states, head, listed.index(states))
                scores = [
                    query @ place(layer, "k", other, shared, slot) / math.sqrt(size)
                    for slot, other in enumerate(listed)
                ]
                shares = softmax(scores, prefix, head)
                if role != "read" and layer.memory and config.memory_gate_init is not None:
                    count, gate = len(layer.memory), weights[f"{prefix}.memory_gate.logits"][head].sigmoid()
                    without = softmax(scores[count:], prefix, head)
                    shares = gate * shares + (1 - gate) * torch.cat((shares.new_zeros(count), without))
                shares = shares * attention_kept
                seen = sum(
                    share * clip("rotary", other.values[shared]) for other, share in zip(listed, shares, strict=True)
                )
                if role == "token" and attentions is not None:
                    attentions[layer.index][head, number, before + inside] = shares[len(layer.memory) :].detach()
                if role == "token" and layer.retrieves:
                    found = retrieve(layer, states.queries[head], shared, inside[0])
                    gate = weights[f"{prefix}.retrieval_gate.logits"][head].sigmoid()
                    seen = seen if found is None else gate * found + (1 - gate) * seen
                mixed.append(seen)
            outputs.append(linear(f"{prefix}.o_proj", torch.cat(mixed)))
        return outputs

    def activate(x: torch.Tensor) -> torch.Tensor:
        return 1 / (1 + x.abs() ** 8) if config.hidden_act == "elephant" else x / (1 + (-x).exp())

    def mlp(prefix: str, group: list[torch.Tensor]) -> list[torch.Tensor]:
        return [
            linear(f"{prefix}.down_proj", activate(linear(f"{prefix}.gate_proj", x)) * linear(f"{prefix}.up_proj", x))
            for x in group
        ]

    def through(role: Role, number: int, group: list[torch.Tensor]) -> list[torch.Tensor]:
        """Vectors that stand for a token, or for read or write tokens, after all layers, before the final norm."""
        for layer in layers:
            if config.norm_placement == "parallel":
                normed = [norm(f"{layer.name}.input_layernorm", x) for x in group]
                attended = attention(layer, role, number, normed)
                sublayers = zip(group, attended, mlp(f"{layer.name}.mlp", normed), strict=True)
                group = [x + kept * attended + kept * transformed for x, attended, transformed in sublayers]
                continue
            for sublayer in ("attention", "feedforward"):
                inner = group
                if config.norm_placement in ("pre", "peri"):
                    inner = [norm(f"{layer.name}.pre_{sublayer}_layernorm", x) for x in group]
                is_mlp = sublayer == "feedforward"
                inner = mlp(f"{layer.name}.mlp", inner) if is_mlp else attention(layer, role, number, inner)
                if config.norm_placement in ("post", "peri"):
                    inner = [norm(f"{layer.name}.post_{sublayer}_layernorm", x) for x in inner]
                group = [x + kept * added for x, added in zip(group, inner, strict=True)]
        return group

    schemes = config.position_embedding
    schemes = [schemes] * config.num_hidden_layers if isinstance(schemes, str) else schemes
    layers = [
        Layer(index, kind, scheme, index in config.retrieval_layers)
        for index, (kind, scheme) in enumerate(zip(config.layer_types, schemes, strict=True))
    ]
    if attentions is not None:
        attentions += [torch.zeros(heads, len(ids), len(ids), dtype=torch.float64) for _ in layers]
    has_memory, reach = config.num_memory_tokens > 0, config.memory_bptt_segments
    length = config.memory_segment_length or len(ids)
    segments = math.ceil(len(ids) / length)
    memory = list(weights["model.memory.embeddings"]) if has_memory else []
    stream = []
    for number, token in enumerate(ids):
        segment, place_in_segment = divmod(number, length)
        if has_memory and place_in_segment == 0:
            if segment > 0 and reach is not None and (segments - segment) % (reach + 1) == 0:
                memory = [x.detach() for x in memory]
            through("read", number, memory)
        stream += through("token", number, [weights["model.embed_tokens.weight"][token]])
        if has_memory and place_in_segment == length - 1:
            memory = [norm("model.memory.norm", x) for x in through("write", number, memory)]
    head = "model.embed_tokens" if config.tie_word_embeddings else "lm_head"
    return torch.stack([linear(head, norm("model.norm", x)) / config.logits_scaling for x in stream])


def judged(model: OlmemForCausalLM, ids: torch.Tensor) -> tuple[torch.Tensor, bool]:
    """Returns the oracle's logits of ids (T,), and whether float32 is sure to agree with them.

    It is where the same tokens are retrieved, and rounding does not grow from segment to segment. A norm bounds the
    vectors of a memory, not how far two of them drift apart: random weights, without a norm of queries and keys above
    all, make a chaotic recurrence. So a text of several segments counts if the oracle itself moves by less than 2e-5
    when its weights move by what float32 rounds, and never a text of more than eight.
    """
    gaps: list[float] = []
    logits = oracle(model, ids, gaps=gaps)
    segments = len(ids) / (model.config.memory_segment_length or 1) if model.config.num_memory_tokens else 0
    clear = min(gaps, default=1.0) > 2e-5 and segments <= 8
    if clear and segments > 1:
        generator = torch.Generator().manual_seed(0)
        moved = {
            name: weight.double() * (1 + 6e-8 * torch.randn(weight.shape, generator=generator).double())
            for name, weight in model.state_dict().items()
        }
        clear = bool((oracle(model, ids, weights=moved) - logits).abs().max() < 2e-5)
    return logits, clear


def expected(model: OlmemForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    """The oracle's logits of ids (T,) that a test has chosen: others, if these leave a choice to rounding."""
    gaps: list[float] = []
    logits = oracle(model, ids, gaps=gaps)
    assert min(gaps, default=1.0) > 2e-5, "two tokens are as good as each other to be retrieved: take other ids"
    return logits
