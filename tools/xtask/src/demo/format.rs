//! Numbers for people.

use serde_json::{Value, json};

/// Converts nanoseconds to seconds; null stays null.
pub(crate) fn seconds(nanoseconds: &Value) -> Value {
    nanoseconds.as_f64().map_or(Value::Null, |nanoseconds| json!(nanoseconds / 1e9))
}

/// Formats a time for people.
pub(crate) fn time(seconds: f64) -> String {
    match seconds {
        s if s < 1e-3 => format!("{:.0} µs", s * 1e6),
        s if s < 1.0 => format!("{:.1} ms", s * 1e3),
        s => format!("{s:.2} s"),
    }
}

/// Formats a number of bytes for people.
pub(crate) fn binary(bytes: u64) -> String {
    match bytes {
        b if b >= 1 << 30 => format!("{:.2} GiB", b as f64 / (1u64 << 30) as f64),
        b if b >= 1 << 20 => format!("{:.1} MiB", b as f64 / (1u64 << 20) as f64),
        b => format!("{:.1} KiB", b as f64 / 1024.0),
    }
}

/// Formats a number with commas.
pub(crate) fn thousands(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_easy_to_read() {
        assert_eq!([0, 999, 1000, 1_234_567].map(thousands), ["0", "999", "1,000", "1,234,567"]);
        assert_eq!([0.000_05, 0.0123, 1.5].map(time), ["50 µs", "12.3 ms", "1.50 s"]);
        assert_eq!([512, 3 << 20, 3 << 29].map(binary), ["0.5 KiB", "3.0 MiB", "1.50 GiB"]);
    }
}
