//! Quantities, formatted for people.

/// Formats a number of bytes, in powers of 1024.
pub(crate) fn bytes(bytes: u64) -> String {
    let units = [("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)];
    match units.iter().find(|(_, shift)| bytes >> shift > 0) {
        Some((unit, shift)) => format!("{} {unit}", digits(bytes as f64 / (1u64 << shift) as f64)),
        None => format!("{bytes} B"),
    }
}

/// Formats bytes per second as bits per second, in powers of 1000, as networks are labelled.
pub(crate) fn rate(bytes_per_second: f64) -> String {
    bits(bytes_per_second * 8.0)
}

/// Formats bits per second, in powers of 1000.
pub(crate) fn bits(bits_per_second: f64) -> String {
    let units = [("Tbit/s", 1e12), ("Gbit/s", 1e9), ("Mbit/s", 1e6), ("kbit/s", 1e3)];
    match units.iter().find(|(_, scale)| bits_per_second >= *scale) {
        Some((unit, scale)) => format!("{} {unit}", digits(bits_per_second / scale)),
        None => format!("{} bit/s", bits_per_second.max(0.0).round()),
    }
}

/// Returns the time now, in seconds since 1970-01-01T00:00:00Z.
pub(crate) fn now() -> f64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default().as_secs_f64()
}

/// Formats a length of time.
pub(crate) fn seconds(seconds: f64) -> String {
    match seconds {
        s if s >= 3600.0 => format!("{} h {:02} min", (s / 3600.0) as u64, (s % 3600.0 / 60.0) as u64),
        s if s >= 100.0 => format!("{} min {:02} s", (s / 60.0) as u64, (s % 60.0) as u64),
        s if s >= 1.0 => format!("{} s", digits(s)),
        s if s >= 0.001 => format!("{} ms", digits(s * 1e3)),
        s => format!("{} µs", (s.max(0.0) * 1e6).round()),
    }
}

/// Formats a whole number, with commas between groups of three digits.
pub(crate) fn count(number: u64) -> String {
    let digits = number.to_string();
    let mut grouped = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            grouped.push(',');
        }
        grouped.push(digit);
    }
    grouped
}

/// Formats a number with its noun: "1 page", "2 pages".
pub(crate) fn plural(number: u64, one: &str) -> String {
    format!("{} {one}{}", count(number), if number == 1 { "" } else { "s" })
}

/// Formats a number with three significant digits.
fn digits(value: f64) -> String {
    match value {
        v if v >= 99.95 => format!("{v:.0}"),
        v if v >= 9.995 => format!("{v:.1}"),
        v => format!("{v:.2}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantities_have_three_digits_and_a_unit() {
        assert_eq!(bytes(0), "0 B");
        assert_eq!(bytes(1023), "1023 B");
        assert_eq!(bytes(1 << 30), "1.00 GiB");
        assert_eq!(bytes(1_288_490_189), "1.20 GiB");
        assert_eq!(rate(1.25e9), "10.0 Gbit/s");
        assert_eq!(rate(0.0), "0 bit/s");
        assert_eq!(bits(250e6), "250 Mbit/s");
        assert_eq!(seconds(0.0083), "8.30 ms");
        assert_eq!(seconds(0.3), "300 ms");
        assert_eq!(seconds(0.000_42), "420 µs");
        assert_eq!(seconds(12.34), "12.3 s");
        assert_eq!(seconds(125.0), "2 min 05 s");
        assert_eq!(seconds(7260.0), "2 h 01 min");
        assert_eq!(count(262_144), "262,144");
        assert_eq!(count(7), "7");
        assert_eq!(plural(1, "page"), "1 page");
        assert_eq!(plural(2, "page"), "2 pages");
    }
}
