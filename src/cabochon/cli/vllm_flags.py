"""Flags of `vllm serve` that mean nothing, one thing only, or something that isn't here; with what to tell people."""

from __future__ import annotations

from collections.abc import Mapping

ALWAYS: Mapping[str, str] = {
    "--enable-auto-tool-choice": "Tool calls need no switch here; they always work.",
    "--async-scheduling": "Requests are prepared and read beside the engine always.",
    "--no-async-scheduling": "Requests are prepared and read beside the engine always.",
    "--enable-chunked-prefill": "Prefill is always chunked beside decoding.",
    "--trust-remote-code": "No checkpoint's code is ever run, so there is nothing to trust.",
    "--enforce-eager": "Steps run eagerly here.",
    "--disable-log-requests": "Prompts are not logged unless --enable-log-requests says so.",
    "--no-enable-log-requests": "Prompts are not logged unless --enable-log-requests says so.",
    "--disable-log-stats": "Statistics are at /metrics and not in the log.",
    "--disable-chunked-mm-input": "An image is never split over two steps.",
    "--enable-log-outputs": "Replies are not logged.",
    "--disable-custom-all-reduce": "There is one device, so nothing to reduce.",
    "--enable-expert-parallel": "All experts are on the one device.",
    "--trust-request-mm-kwargs": "A request may always choose its media budget within the server's limits.",
    "--enable-server-load-tracking": "/load always counts.",
    "--enable-prompt-tokens-details": "Cached tokens are always told in usage.",
    "--enable-request-id-headers": "Every answer carries x-request-id.",
    "--disable-frontend-multiprocessing": "There is one process.",
    "--disable-uvicorn-access-log": "There is one log; --log-level warning leaves requests out.",
    "--disable-hybrid-kv-cache-manager": "Window and global pages are always separate.",
}
"""Switches for what can't be switched off."""

FIXED: Mapping[str, tuple[frozenset[str], str]] = {
    "--reasoning-parser": (frozenset({"gemma4"}), "Thinking is always parsed."),
    "--tool-call-parser": (frozenset({"gemma4"}), "Tool calls are always parsed."),
    "--tensor-parallel-size": (frozenset({"1"}), ""),
    "--pipeline-parallel-size": (frozenset({"1"}), ""),
    "--data-parallel-size": (frozenset({"1"}), ""),
    "--generation-config": (frozenset({"auto"}), "Sampling defaults come from the checkpoint."),
    "--load-format": (frozenset({"auto", "safetensors", "fastsafetensors"}), "Weights are read from safetensors."),
    "--tokenizer-mode": (frozenset({"auto", "hf"}), ""),
    "--distributed-executor-backend": (frozenset({"mp", "uni"}), "There is one process."),
    "--config-format": (frozenset({"auto", "hf"}), ""),
    "--max-logprobs": (frozenset(map(str, range(21))), "Requests may ask for 20."),
    "--scheduling-policy": (frozenset({"fcfs"}), ""),
    "--stream-interval": (frozenset({"1"}), ""),
    "--api-server-count": (frozenset({"1"}), ""),
    "--response-role": (frozenset({"assistant"}), ""),
    "--allowed-methods": (frozenset({'["*"]'}), "Origins that are allowed may use every method."),
    "--allowed-headers": (frozenset({'["*"]'}), "Origins that are allowed may send every header."),
    "--model-impl": (frozenset({"auto", "vllm"}), "There is one implementation."),
}
"""Flags whose values stand for what is done anyway; other values are refused with the reason below."""

REASONS: Mapping[str, str] = {
    "--reasoning-parser": "this server speaks Gemma 4 only, so the parser is gemma4",
    "--tool-call-parser": "this server speaks Gemma 4 only, so the parser is gemma4",
    "--tensor-parallel-size": "splitting a model over several devices is not available yet; start with 1",
    "--pipeline-parallel-size": "splitting a model over several devices is not available yet; start with 1",
    "--data-parallel-size": "several copies in one server are not available; start one server per copy",
    "--generation-config": "sampling defaults come from the checkpoint; set them per request instead",
    "--max-logprobs": "20 alternatives per token are the most",
    "--scheduling-policy": "requests are served in order of arrival (fcfs)",
    "--stream-interval": "every token is sent as it comes (1)",
    "--api-server-count": "there is one process",
}

STORED_QUANTIZATION = frozenset(
    {"compressed-tensors", "gptq", "gptq_marlin", "awq", "awq_marlin", "bitsandbytes", "modelopt"}
)
"""Values of `--quantization` that describe what a checkpoint already is."""

REFUSED: Mapping[str, str] = {
    "--enable-lora": "adapters are not served yet; merge them into the checkpoint",
    "--lora-modules": "adapters are not served yet; merge them into the checkpoint",
    "--cpu-offload-gb": "weights can't be kept in two places yet; choose a smaller or quantised checkpoint",
    "--ssl-keyfile": "TLS belongs to a proxy in front; this server speaks plain HTTP",
    "--ssl-certfile": "TLS belongs to a proxy in front; this server speaks plain HTTP",
    "--root-path": "let the proxy in front take the prefix off",
    "--middleware": "no code is loaded from outside",
    "--revision": "write the model as NAME@REVISION",
    "--tokenizer": "a checkpoint's own tokenizer is used",
    "--hf-token": "set HF_TOKEN in the environment",
    "--hf-overrides": "a checkpoint runs as its config.json says",
    "--rope-scaling": "a checkpoint runs as its config.json says",
    "--override-generation-config": "sampling is the checkpoint's, or a Modelfile's; set it per request",
    "--enable-sleep-mode": "stop the server; it starts in seconds",
    "--runner": "only generation is served",
    "--task": "only generation is served",
}
"""Flags for what isn't there, each with what to do instead."""

PASSED = {
    "--attention-backend": "The kernels are chosen by device.",
    "--seed": "A request without a seed draws by chance; give it one for repeatable replies.",
    "--swap-space": "Nothing is swapped.",
    "--compilation-config": "Nothing is compiled at start.",
    "--optimization-level": "Nothing is compiled at start.",
    "--structured-outputs-config": "Structured outputs have one backend.",
    "--mm-encoder-tp-mode": "There is one device.",
    "--moe-backend": "The kernels are chosen by device.",
    "--mm-processor-cache-gb": "What the towers made of media is kept beside the pages.",
    "--chat-template-content-format": "Texts and lists of parts are both understood.",
    "--prefix-caching-hash-algo": "There is one hash.",
    "--max-log-len": "With --enable-log-requests prompts are logged whole.",
    "--uvicorn-log-level": "There is one log; see --log-level.",
    "--download-dir": "The Hugging Face cache is used; see HF_HOME.",
}
"""Flags with a value that makes no difference here."""
