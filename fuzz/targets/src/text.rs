//! Text that strangers have written, on its way to a person.

use memlane_protocol::wire::{MAX_TEXT_BYTES, is_obeyed};

/// Checks a text that was made plain when it was decoded: a terminal shows it, and a message can carry it on.
pub(crate) fn check_plain(text: &str) {
    assert!(!text.contains(is_obeyed), "a terminal would obey {text:?}");
    assert!(text.len() <= MAX_TEXT_BYTES, "{} bytes are more than a message carries: {text:?}", text.len());
}

/// Checks a complaint about a file: a refusal can carry it whole to the host that sent the file.
pub(crate) fn check_complaint(text: &str) {
    assert!(text.len() <= MAX_TEXT_BYTES, "{} bytes are more than a message carries: {text:?}", text.len());
}
