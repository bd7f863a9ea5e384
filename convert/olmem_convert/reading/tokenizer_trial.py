"""A tokenizer tried in a process of its own, whose end is no loss: run as a file, with its tokenizer.json on standard
input.

The library that runs tokenizers ends the whole process over some of them, panics over others, and matches regular
expressions that have no end. What comes to its end here does so in the process that asks, too.
"""

import signal
import sys
from contextlib import suppress
from typing import Any

SECONDS, MEMORY = 8, 2**32  # of the processor, and bytes; the largest tokenizers in use take 3 and 2**30

# Texts on which splitting rules, normalizers and byte fallbacks are known to part.
PROBES = (
    "",
    *("12345678901234567890"[:length] for length in range(1, 21)),
    "5123 65536 10000 1000000 20262026 31415926535897932384626433832795",
    "1,234,567.89 3.14159e-26 0x1F 007",
    "2026-11-22 12:34:56 100% $5.00 v1.2.3rc4 a1b22c333d4444",
    "\u0661\u0662\u0663\u0664\u0665 \uff11\uff12\uff13\uff14 \u00bd\u00b2\u2463\u2167 \u4e09\u5341\u4e94",
    *("\n" * length for length in range(1, 6)),
    *("\t" * length for length in range(1, 5)),
    *(" " * length for length in (1, 2, 3, 4, 7, 8, 16, 33)),
    " leading and trailing ",
    "  two  gaps   here    now",
    " \n  \n\n indented\n\n\n end\n",
    "\n\tx\n\t\ty \t \n\t z",
    "one\r\ntwo\r\n\r\nthree\rfour\n\rfive",
    "no\u00a0break\u2003em\u3000wide\u2028line\u0085next\x0btab\x0cpage",
    "I'm you're he'll we've they'd it's don't I'M YOU'RE HE'LL WE'VE THEY'D IT'S it\u2019s o'clock 'tis '90s ''s",
    'Hello, world! ("quoted") [x] {y} ... --- ___ ?!?! ~`@#$%^&*+=|\\<>/;: #tag @user a/b/c e.g. U.S.A.',
    'def f(x: int) -> str:\n    return f"{x!r:>10}"  # note\n\n\nclass A(B):\n\tpass\n',
    "for (int i=0;i<10;++i){ a[i]+=b->c*2; }\r\n// end\n<p class=\"x\">&amp;</p> SELECT * FROM t WHERE a<>'b';",
    "https://example.org/a_b?q=1&r=%20#x user.name+tag@mail.example C:\\Temp\\new.txt camelCase snake_case UPPER",
    "na\u00efve caf\u00e9 \u00dcbung stra\u00dfe \u0152uvre \u0141\u00f3d\u017a \u0130stanbul \u01c5 \ufb01n",
    "cafe\u0301 n\u0303 a\u0308\u0323 Z\u0351\u036b\u0343 \u0301lone e\u20dd \u212b \u00c5 A\u030a \u1e9b\u0323",
    "\u4f60\u597d\uff0c\u4e16\u754c\u3002\u65e5\u672c\u8a9e\u3072\u3089\u304c\u306a\u30ab\u30bf\u30ab\u30ca\uff76\uff9e",
    "\ud55c\uad6d\uc5b4 \uac00 \u1100\u1161 \u0928\u092e\u0938\u094d\u0924\u0947 \u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35",
    "\u0645\u0631\u062d\u0628\u0627 \u05e9\u05b8\u05c1\u05dc\u05d5\u05b9\u05dd \u200frtl\u200e \u202bmixed 123\u202c",
    "\u0391\u03b8\u03ae\u03bd\u03b1 \u041f\u0440\u0438\u0432\u0435\u0442 \u10d2\u10d0 \u1e9e \u20ac \u201cq\u201d",
    "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f44d\U0001f3fd \U0001f1eb\U0001f1f7 1\ufe0f\u20e3",
    "\U00010348\U0001d49c\U00020000\U0002f800 \U000e0041 \U0010fffd \ue000 \ufffd \ufeff",
    "\x00\x01\x7f\u200b\u00ad\u2060 \u2211\u222b\u221a2 \u2264 \u2192 \u2500\u2502\u2588 \u2026 \u2014",
    "a" * 40 + " " + "=" * 33 + " antidisestablishmentarianism MiXeD cAsE ABCdef",
)


def texts_for(tokenizer: Any) -> list[str]:
    """The probes, and texts with each added token."""
    texts = [*PROBES]
    for token in tokenizer.get_added_tokens_decoder().values():
        texts += [token.content, token.content * 2, f"one {token.content} two{token.content}3\n{token.content}\n"]
    return texts


def limit() -> None:
    """Where the system knows of limits; elsewhere the process that asks waits no longer than it wants to."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_PROF, SECONDS)  # whose signal ends the process, whatever it is in
    with suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))


def main() -> None:
    """Makes the tokenizer, and has it encode and decode the probes."""
    limit()
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_buffer(sys.stdin.buffer.read())
        tokenizer.no_truncation()
        tokenizer.no_padding()
        for text in texts_for(tokenizer):
            for special in (False, True):
                ids = tokenizer.encode(text, add_special_tokens=special).ids
                for skip in (False, True):
                    tokenizer.decode(ids, skip_special_tokens=skip)
    except BaseException as error:  # a panic is no Exception
        sys.exit(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
