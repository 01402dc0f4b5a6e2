"""The regular expressions that cut a text before byte-level BPE, and llama.cpp's names for them. Knows no files."""

GPT2_SPLIT = "ByteLevel"
DIGITS_SPLIT = "Digits"
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
O200K_SPLIT = "|".join(
    [
        r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?""",
        r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?""",
        r"""\p{N}{1,3}""",
        r""" ?[^\s\p{L}\p{N}]+[\r\n/]*""",
        r"""\s*[\r\n]+""",
        r"""\s+(?!\S)""",
        r"""\s+""",
    ]
)

PRE_TOKENIZERS: dict[tuple[tuple[str, ...], bool], str] = {
    ((GPT2_SPLIT,), False): "gpt-2",
    ((DIGITS_SPLIT, GPT2_SPLIT), False): "smollm",
    ((LLAMA3_SPLIT,), True): "llama-bpe",
    ((LLAMA3_SPLIT,), False): "smaug-bpe",
    ((QWEN2_SPLIT,), False): "qwen2",
    ((O200K_SPLIT,), False): "gpt-4o",
    ((O200K_SPLIT,), True): "gpt-4o",  # llama.cpp does merge there, to the same end: merges lead to each of its tokens
}
"""(the steps of the pre-tokenizer, whether a word that is a token skips the merges) to llama.cpp's name for both."""
