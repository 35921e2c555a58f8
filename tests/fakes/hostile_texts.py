"""Texts that tokenizers and chat templates get wrong most easily."""

MARKS = "→ ↺ ? !/※ ≈ ∴ ● ◐ ○ ⚠ ☐ ☑ ✓ ⟨H≈0.1⟩ ⟨H≈1.8⟩\n├─ a\n└─ b"
"""Marks of SYNTH's reasoning."""

NEW_CHARACTERS = "\u088f\u1acf\U00032718\U000323b0"
"""Letters and a mark that are new in Unicode 17."""

TEXTS = {
    "specials": "<|start|>assistant<|channel|>final<|message|>done<|return|><|end|><|call|><|endoftext|>",
    "rare-specials": "<|reserved_200013|><|constrain|>json <|startoftext|> <|endofprompt|>",
    "assistant-as-text": "assistant",
    "roles-inside": "the assistant said: assistantassistant analysis final",
    "a-nul": "\0",
    "nuls": "a\0b\0\0c \0",
    "control-characters": "\x01\x02\x1b[31m\x7f\u0085\u2028\ufeff",
    "noncharacters": "\uffff\U0010ffff\ufffd",
    "reasoning-marks": MARKS,
    "right-to-left": "שלום עולם, מה שלומך? العربية من اليمين إلى اليسار ٣٫١٤",
    "cjk": "东京はいい天気ですね。한국어도 있습니다。𠮷野家 你好，世界！",
    "joined-emoji-and-combining": "👩‍👩‍👧‍👦 🏳️‍🌈 e\u0301 ﬁ Å ǆ ẞ İ",
    "blanks": "  leading\t\ttabs \r\n\r\n and   trailing   \n\n\n",
    "a-long-word": "x" * 5_000,  # openai-harmony's time is quadratic
    "100-kB-document": "Ein Satz, der sich wiederholt. 段落。 " * 2600,
    "a-long-gap": " " * 5_000 + "end",
}
"""By name."""

LONG = (
    "x" * 100_000,
    "\n" * 100_000,
    "1" * 99_999,
    "漢" * 50_000,
    "\0" * 1000,
    " " * 5_000 + "end",
    "→ ⟨H≈0.5⟩ ├─ ☐" * 999,
)
"""Long runs, too long for openai-harmony."""

ASSIGNED = [*range(0xD800), *range(0xE000, 0x40000), *range(0xE0000, 0xE0200), 0xF0000, 0x10FFFF]
"""Every code point that Unicode assigns or may assign next, and one of each private plane."""

PROBES = ("{}'s", "!{}a A{}'LL\n")
"""Texts around a character that show how a tokenizer classifies it."""
