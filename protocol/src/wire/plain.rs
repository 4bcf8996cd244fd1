//! Text that was written by others, on its way to a terminal or a log.

use std::borrow::Cow;

/// This character stands in the place of those that are left out.
const REPLACEMENT: char = char::REPLACEMENT_CHARACTER;

/// Returns the text without characters that a terminal or the reader of a log would obey instead of showing.
///
/// These are the control characters (C0, DEL and C1: ECMA-48, ISO 6429), of which escape sequences are made;
/// Unicode's separators of lines and paragraphs; and those that turn the direction of what follows
/// (Unicode Standard Annex 9). Tabs and ends of lines become spaces, and all others become U+FFFD. The result of a
/// second call is the same.
pub fn plain(text: &str) -> Cow<'_, str> {
    if !text.contains(is_obeyed) {
        return Cow::Borrowed(text);
    }
    let replaced = text.trim_end_matches(['\r', '\n']).chars().map(|character| match character {
        '\t' | '\n' | '\r' | '\u{2028}' | '\u{2029}' => ' ',
        obeyed if is_obeyed(obeyed) => REPLACEMENT,
        shown => shown,
    });
    Cow::Owned(replaced.collect())
}

/// Applies [`plain`] to each line of a text, and keeps the number of lines.
pub fn plain_lines(text: &str) -> String {
    let lines: Vec<Cow<'_, str>> = text.split('\n').map(plain).collect();
    lines.join("\n")
}

/// Tells whether a terminal or the reader of a log would obey a character instead of showing it. [`plain`] text has no
/// such character.
pub fn is_obeyed(character: char) -> bool {
    character.is_control()
        || matches!(
            character,
            '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{206f}'
        )
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_a_terminal_would_obey_is_replaced() {
        for (text, expected) in [
            ("", ""),
            ("no such file: é, 漢, 🦀", "no such file: é, 漢, 🦀"),
            ("\u{1b}[2Jgone", "\u{fffd}[2Jgone"),
            ("\u{9b}2J\u{7f}\0", "\u{fffd}2J\u{fffd}\u{fffd}"),
            ("one\r\ntwo\tthree\n", "one  two three"),
            (
                "2026 INFO all is well\u{2028}x\u{202e}y\u{2067}z\u{200f}",
                "2026 INFO all is well x\u{fffd}y\u{fffd}z\u{fffd}",
            ),
        ] {
            assert_eq!(plain(text), expected);
        }
        assert!(matches!(plain("as it is"), Cow::Borrowed(_)));
    }

    proptest! {
        #[test]
        fn nothing_is_obeyed_of_whatever_text(text: String, bytes: Vec<u8>) {
            for text in [text, String::from_utf8_lossy(&bytes).into_owned(), bytes.iter().map(|byte| char::from(*byte)).collect()] {
                let lines = plain_lines(&text);
                prop_assert!(!lines.replace('\n', "").contains(is_obeyed));
                prop_assert_eq!(lines.split('\n').count(), text.split('\n').count());
                let once = plain(&text).into_owned();
                prop_assert!(!once.contains(is_obeyed), "{once:?}");
                prop_assert!(once.bytes().all(|byte| byte >= b' ' && byte != 0x7f));
                prop_assert_eq!(plain(&once), once.as_str());
            }
        }
    }
}
