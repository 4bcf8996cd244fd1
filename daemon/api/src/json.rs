//! JSON that can be shown on a terminal as it is.

use memlane_protocol::wire::is_obeyed;
use serde::Serialize;

/// Writes a value as JSON in which characters that a terminal would obey are escaped (RFC 8259, 7). Such characters occur
/// within strings only, and a reader of the JSON gets them back.
///
/// # Panics
///
/// Panics if the value has keys that are no strings, as none of the API's types does.
pub fn to_json(value: &impl Serialize) -> String {
    let json = serde_json::to_string(value).expect("the API's types have string keys only, and cannot fail");
    if !json.contains(is_obeyed) {
        return json;
    }
    let mut escaped = String::with_capacity(json.len() + 64);
    for character in json.chars() {
        if is_obeyed(character) {
            let mut units = [0; 2];
            for unit in character.encode_utf16(&mut units) {
                escaped.push_str(&format!("\\u{unit:04x}"));
            }
        } else {
            escaped.push(character);
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn whatever_text_is_read_again_and_shown_as_it_is(text: String, word in any::<[char; 4]>()) {
            let text = text + "\u{1b}[2J\u{9b}\u{7f}\u{202e}" + &String::from_iter(word);
            let json = to_json(&[&text]);
            prop_assert!(!json.contains(is_obeyed), "{json:?}");
            prop_assert_eq!(serde_json::from_str::<Vec<String>>(&json).unwrap(), [text]);
        }

        #[test]
        fn whatever_fraction_is_read_again_as_it_was(fraction in 0.001..60.0) {
            prop_assert_eq!(serde_json::from_str::<f64>(&to_json(&fraction)).unwrap(), fraction);
        }
    }
}
