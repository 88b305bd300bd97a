"""Chat templates of the kinds that models have, in few words, and tokenizers with their control tokens."""

from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

CHATML = """
{%- for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

# Tools in the system's message, calls and results in tags, results of a row in one turn of the user.
_CALLS = """
{%- macro calls(m) %}{% for call in m.tool_calls %}{% if m.content or not loop.first %}{{ '\\n' }}{% endif -%}
<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}{% endmacro %}"""
_SYSTEM = """
{%- if tools %}<|im_start|>system
{{ messages[0].content if messages[0].role == 'system' else '' }}

# Tools
<tools>{% for tool in tools %}
{{ tool | tojson }}{% endfor %}
</tools><|im_end|>
{% elif messages[0].role == 'system' %}<|im_start|>system
{{ messages[0].content }}<|im_end|>
{% endif %}"""
_RESULT = """
{%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}<|im_start|>user{% endif %}{{ '\\n' -}}
<tool_response>
{{ m.content }}
</tool_response>{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}<|im_end|>
{% endif %}"""

QWEN25 = (
    _CALLS
    + _SYSTEM
    + """
{%- for m in messages %}
{%- if m.role == 'user' %}<|im_start|>user
{{ m.content }}<|im_end|>
{% elif m.role == 'assistant' %}<|im_start|>assistant
{{ m.content }}{{ calls(m) if m.tool_calls else '' }}<|im_end|>
{% elif m.role == 'tool' %}"""
    + _RESULT
    + """{% endif %}{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
)

# The reasoning of turns before the last question is left out; without reasoning, the prompt has an empty one.
QWEN3 = (
    _CALLS
    + _SYSTEM
    + """
{%- set ns = namespace(last=-1) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
{%- if m.role == 'user' %}<|im_start|>user
{{ m.content }}<|im_end|>
{% elif m.role == 'assistant' %}
{%- set content, reasoning = m.content, m.reasoning_content or '' %}
{%- if '</think>' in content %}
{%- set reasoning = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
{%- set content = content.split('</think>')[-1].lstrip('\\n') %}
{%- endif %}<|im_start|>assistant
{% if loop.index0 > ns.last and (loop.last or reasoning) -%}
<think>
{{ reasoning.strip('\\n') }}
</think>

{% endif %}{{ content }}{{ calls({'content': content, 'tool_calls': m.tool_calls}) if m.tool_calls else '' }}<|im_end|>
{% elif m.role == 'tool' %}"""
    + _RESULT
    + """{% endif %}{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and not enable_thinking %}<think>

</think>

{% endif %}{% endif %}"""
)

# Models that always reason: the prompt has the beginning.
REASONING = QWEN3.replace(
    "{% if enable_thinking is defined and not enable_thinking %}", "<think>\n{% if false %}"
)

# Contents are trimmed; a call is the whole message, its results are written as JSON.
LLAMA3 = """
{%- macro header(role) %}<|start_header_id|>{{ role }}<|end_header_id|>

{% endmacro %}<|begin_of_text|>{{ header('system') }}
{%- if tools %}Environment: ipython
{% endif %}Cutting Knowledge Date: December 2023

{% if messages[0].role == 'system' %}{{ messages[0].content | trim }}{% endif %}<|eot_id|>
{%- for m in messages %}
{%- if m.role == 'user' %}{{ header('user') }}{{ m.content | trim }}<|eot_id|>
{%- elif m.role == 'assistant' and not m.tool_calls %}{{ header('assistant') }}{{ m.content | trim }}<|eot_id|>
{%- elif m.role == 'assistant' %}
{%- if m.tool_calls | length != 1 %}{{ raise_exception('This model only supports single tool-calls at once!') }}{% endif %}
{%- set call = m.tool_calls[0].function %}{{ header('assistant') -}}
{"name": "{{ call.name }}", "parameters": {{ call.arguments | tojson }}}<|eot_id|>
{%- elif m.role == 'tool' %}{{ header('ipython') }}
{%- if m.content is mapping %}{{ m.content | tojson }}{% else %}{{ m.content }}{% endif %}<|eot_id|>
{%- endif %}{% endfor %}
{%- if add_generation_prompt %}{{ header('assistant') }}{% endif %}"""

# Turns of user and assistant alternate, or the template raises; calls need ids of nine characters, and the tools are
# before the last question.
MISTRAL = """
{%- set ns = namespace(users=0, replies=0, last=-1) %}<s>
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
{%- if m.role == 'user' %}
{%- if ns.users != ns.replies %}{{ raise_exception('roles must alternate') }}{% endif %}
{%- set ns.users = ns.users + 1 %}
{%- if tools and loop.index0 == ns.last %}[AVAILABLE_TOOLS] {{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif -%}
[INST] {{ m.content }}[/INST]
{%- elif m.role == 'assistant' and m.tool_calls %}[TOOL_CALLS] [
{%- for call in m.tool_calls %}
{%- if call.id is not defined or call.id | length != 9 %}{{ raise_exception('ids need a length of 9') }}{% endif -%}
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}, "id": "{{ call.id }}"}
{%- if not loop.last %}, {% endif %}{% endfor %}]</s>
{%- elif m.role == 'assistant' %}
{%- set ns.replies = ns.replies + 1 %}
{%- if ns.users != ns.replies %}{{ raise_exception('roles must alternate') }}{% endif %} {{ m.content | trim }}</s>
{%- elif m.role == 'tool' %}[TOOL_RESULTS] {"content": {{ m.content | tojson }}, "call_id": "{{ m.tool_call_id }}"}[/TOOL_RESULTS]
{%- endif %}{% endfor %}"""

# Channels: the analysis is kept until a final message; that ends with <|return|>, and in a history with <|end|>.
HARMONY = """
{%- set ns = namespace(final=-1, tool=None) %}
{%- for m in messages %}{% if m.role == 'assistant' and not m.tool_calls %}{% set ns.final = loop.index0 %}{% endif %}{% endfor -%}
<|start|>system<|message|>Reasoning: medium<|end|>
{%- if tools %}<|start|>developer<|message|># Tools
{{ tools | tojson }}<|end|>{% endif %}
{%- for m in messages %}
{%- if m.role == 'user' %}<|start|>user<|message|>{{ m.content }}<|end|>
{%- elif m.role == 'assistant' %}
{%- if '<|channel|>' in m.content %}{{ raise_exception('channels belong into fields of their own') }}{% endif %}
{%- if m.thinking and m.tool_calls and loop.index0 > ns.final %}<|start|>assistant<|channel|>analysis<|message|>{{ m.thinking }}<|end|>{% endif %}
{%- if m.tool_calls %}{% set ns.tool = m.tool_calls[0].function.name -%}
<|start|>assistant to=functions.{{ ns.tool }}<|channel|>commentary json<|message|>{{ m.tool_calls[0].function.arguments | tojson }}<|call|>
{%- else %}<|start|>assistant<|channel|>final<|message|>{{ m.content }}<|end|>{% endif %}
{%- elif m.role == 'tool' %}
{%- if not ns.tool %}{{ raise_exception('a result without a call') }}{% endif -%}
<|start|>functions.{{ ns.tool }} to=assistant<|channel|>commentary<|message|>{{ m.content | tojson }}<|end|>
{%- endif %}{% endfor %}
{%- if add_generation_prompt %}<|start|>assistant{% endif %}"""


@dataclass(frozen=True)
class Kind:
    """A template, its control tokens, those that end a response (the template's own first), and its variables."""

    template: str
    special: tuple[str, ...]
    ends: tuple[str, ...]
    added: tuple[str, ...] = ()
    kwargs: dict = field(default_factory=dict)


_IM = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_TAGS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")

KINDS = {
    "chatml": Kind(CHATML, _IM, ("<|im_end|>",)),
    "qwen2.5": Kind(QWEN25, _IM, ("<|im_end|>",), _TAGS[:2]),
    "qwen3": Kind(QWEN3, _IM, ("<|im_end|>",), _TAGS),
    "qwen3-no-thinking": Kind(QWEN3, _IM, ("<|im_end|>",), _TAGS, {"enable_thinking": False}),
    "reasoning": Kind(REASONING, _IM, ("<|im_end|>",), _TAGS),
    "llama3": Kind(
        LLAMA3,
        ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>", "<|python_tag|>"),
        ("<|eot_id|>",),
    ),
    "mistral": Kind(
        MISTRAL,
        ("<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
        ("</s>",),
    ),
    "harmony": Kind(
        HARMONY,
        ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|constrain|>", "<|return|>", "<|call|>"),
        ("<|return|>", "<|call|>"),
    ),
}  # fmt: skip

_MERGES = [
    ("Ċ", "Ċ"), ("t", "h"), ("th", "e"), ("Ġ", "the"), ("Ġ", "Ġ"), (">", "Ċ"), ("}", "}"), ("u", "s"),
    ("us", "e"), ("use", "r"), ("user", "Ċ"), ("{", '"'), ("n", "a"), ("na", "m"), ("nam", "e"), ("!", "Ċ"), ("Ã", "©"),
]  # fmt: skip


@cache
def tokenizer_of(name: str) -> "PreTrainedTokenizerFast":
    """A byte-level tokenizer with a few merges and the control tokens of a template."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    kind = KINDS[name]
    vocab = {piece: i for i, piece in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    for left, right in _MERGES:
        vocab[left + right] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=_MERGES))
    words = Regex(r" ?[^\s\w]+[\n]*|[^\n\w]?\w+|\s*\n+|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in kind.special])
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in kind.added])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=kind.ends[0], chat_template=kind.template
    )
