"""Flags that scripts share."""
import argparse


def bool_flag(text):
    """argparse type for `true/false`, `on/off`, `1/0` in any case."""
    word = text.lower()
    if word in ("true", "on", "1"):
        return True
    if word in ("false", "off", "0"):
        return False
    raise argparse.ArgumentTypeError(f"expected true or false, not {text!r}")

