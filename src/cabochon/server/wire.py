"""The requests as they travel: what each field may hold, and nothing about what it means.

Fields that a protocol knows and that change nothing here (`user`, `service_tier`) are not listed: unknown fields are
ignored, save for those in `refused`. Wrong types and ranges become a 400 that names the field (see `faults`).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from . import refused

Count = Annotated[int, Field(ge=1, le=2**31)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Share = Annotated[float, Field(gt=0, le=1)]
Temperature = Annotated[float, Field(ge=0, le=100)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
Bias = dict[Annotated[str, Field(pattern=r"^[0-9]{1,9}$")], Annotated[float, Field(ge=-100, le=100)]]
Stops = Annotated[str, Field(min_length=1)] | list[Annotated[str, Field(min_length=1)]] | None


class Wire(BaseModel):
    """A piece of a request."""

    model_config = ConfigDict(extra="ignore", strict=True)


# Shared -------------------------------------------------------------------------------------------------------------


class Sampling(Wire):
    """What every endpoint of OpenAI's family (and vLLM's additions) lets a caller choose."""

    _refused = model_validator(mode="before")(refused.check)
    temperature: Temperature | None = None
    top_p: Share | None = None
    top_k: Annotated[int, Field(ge=-1, le=2**31)] | None = Field(None, description="0 and -1 switch it off.")
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Seed | None = None
    stop: Stops = None
    stop_token_ids: list[TokenId] | None = None
    ignore_eos: bool | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    logit_bias: Bias | None = None


class StructuredOutputs(Wire):
    """vLLM's way to constrain the text; exactly one field."""

    json_: dict[str, Any] | str | None = Field(None, alias="json")
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = Field(None, description="In Lark syntax.")
    json_object: bool | None = None


class StreamOptions(Wire):
    include_usage: bool | None = None


# Chat completions ---------------------------------------------------------------------------------------------------


class ChatMessage(Wire):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[dict[str, Any]] | None = None
    name: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None


class Function(Wire):
    name: Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[A-Za-z0-9_.:-]+$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class FunctionTool(Wire):
    type: Literal["function"] = "function"
    function: Function


class FunctionName(Wire):
    name: str


class NamedTool(Wire):
    type: Literal["function"]
    function: FunctionName


class AllowedTools(Wire):
    mode: Literal["auto", "required"]
    tools: list[NamedTool]


class AllowedToolsChoice(Wire):
    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


class JsonSchema(Wire):
    name: str = "schema"
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Wire):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class TemplateKwargs(Wire):
    enable_thinking: bool | None = None
    preserve_thinking: bool | None = None


class MediaKwargs(Wire):
    """vLLM's way to say how media are cut; it holds for parts that don't say themselves."""

    max_soft_tokens: Literal[70, 140, 280, 560, 1120] | None = Field(None, description="Per image.")
    fps: Annotated[float, Field(gt=0, le=1000)] | None = None
    num_frames: Annotated[int, Field(ge=1, le=4096)] | None = None
    max_frames: Annotated[int, Field(ge=1, le=4096)] | None = None
    sound: bool | None = Field(None, description="A video's sound track comes after its frames.")
    split: bool | None = Field(None, description="Sound of more than 30 seconds is cut into overlapping pieces.")


class ChatRequest(Sampling):
    """POST /v1/chat/completions"""

    model: str | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: list[FunctionTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | AllowedToolsChoice | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    reasoning_effort: Effort | None = None
    thinking_token_budget: Annotated[int, Field(ge=0, le=2**31)] | None = None
    include_reasoning: bool | None = Field(None, description="False: the reply without the thinking before it.")
    chat_template_kwargs: TemplateKwargs | None = None
    mm_processor_kwargs: MediaKwargs | None = None


# Completions and tokens ---------------------------------------------------------------------------------------------


class CompletionRequest(Sampling):
    """POST /v1/completions"""

    model: str | None = None
    prompt: str | list[str] | list[TokenId] | list[list[TokenId]]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Count | None = 16
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool | None = None
    structured_outputs: StructuredOutputs | None = None


class TokenizeRequest(Wire):
    """POST /tokenize: `prompt`, or `messages` as for a chat."""

    _refused = model_validator(mode="before")(refused.check)
    model: str | None = None
    prompt: str | None = None
    add_special_tokens: bool | None = Field(None, description="False: a prompt without the token that begins a text.")
    return_token_strs: bool | None = None
    messages: list[ChatMessage] | None = None
    tools: list[FunctionTool] | None = None
    chat_template_kwargs: TemplateKwargs | None = None


class DetokenizeRequest(Wire):
    """POST /detokenize"""

    model: str | None = None
    tokens: list[TokenId]


# Responses ----------------------------------------------------------------------------------------------------------


class ResponseTool(Wire):
    type: str
    name: str | None = None
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ResponseToolChoice(Wire):
    type: Literal["function", "allowed_tools"]
    name: str | None = None
    mode: Literal["auto", "required"] | None = None
    tools: list[dict[str, Any]] | None = None


class ResponseTextFormat(Wire):
    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseText(Wire):
    format: ResponseTextFormat | None = None


class Reasoning(Wire):
    effort: Effort | None = None


class ResponsesRequest(Sampling):
    """POST /v1/responses"""

    model: str | None = None
    input: str | list[dict[str, Any]]
    instructions: str | None = None
    previous_response_id: str | None = None
    max_output_tokens: Count | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    include: list[str] | None = None
    tools: list[ResponseTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | ResponseToolChoice | None = None
    parallel_tool_calls: bool | None = None
    text: ResponseText | None = None
    reasoning: Reasoning | None = None
    stream: bool | None = None
    store: bool | None = None
    background: bool | None = None
    truncation: Literal["auto", "disabled"] | None = None
    metadata: dict[str, str] | None = None


# Anthropic messages -------------------------------------------------------------------------------------------------


class AnthropicMessage(Wire):
    role: Literal["user", "assistant", "system"]
    content: str | list[dict[str, Any]]


class AnthropicTool(Wire):
    name: Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[A-Za-z0-9_.:-]+$")]
    type: str | None = None
    description: str | None = None
    input_schema: dict[str, Any] | None = None
    strict: bool | None = None


class AnthropicToolChoice(Wire):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class AnthropicThinking(Wire):
    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Annotated[int, Field(ge=0, le=2**31)] | None = None


class CountRequest(Wire):
    """POST /v1/messages/count_tokens"""

    model: str | None = None
    messages: Annotated[list[AnthropicMessage], Field(min_length=1)]
    system: str | list[dict[str, Any]] | None = None
    tools: list[AnthropicTool] | None = None
    tool_choice: AnthropicToolChoice | None = None
    thinking: AnthropicThinking | None = None


class OutputFormat(Wire):
    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(Wire):
    format: OutputFormat | None = None


class MessagesRequest(CountRequest):
    """POST /v1/messages"""

    max_tokens: Count
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Share | None = None
    top_k: Annotated[int, Field(ge=0, le=2**31)] | None = None
    stop_sequences: list[Annotated[str, Field(min_length=1)]] | None = None
    stream: bool | None = None
    output_config: OutputConfig | None = None
