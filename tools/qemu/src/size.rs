//! Sizes as QEMU writes them.

/// The size of the RAM of a guest that is not told one, in bytes.
const DEFAULT_MEMORY: u64 = 128 << 20;
/// QEMU rounds `-m` up to a multiple of this many bytes, and refuses a backend of another size.
const MEMORY_UNIT: u64 = 8 << 10;
/// The unit of `-m` without a suffix, in bytes.
const MEBIBYTE: u64 = 1 << 20;

/// Reads a size such as `2G`, `1.5g`, `0x1000` or `4096`, which is in bytes without a suffix. Returns `None` where QEMU
/// refuses it (`qemu_strtosz()`).
pub(crate) fn parse(text: &str) -> Option<u64> {
    if let Some(digits) = text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        // from_str_radix() would take a sign as well.
        let is_number = digits.bytes().all(|byte| byte.is_ascii_hexdigit());
        return is_number.then(|| u64::from_str_radix(digits, 16).ok()).flatten();
    }
    let (number, shift) = match text.char_indices().next_back()? {
        (at, suffix) if suffix.is_ascii_alphabetic() => {
            let power = "bkmgtpe".find(suffix.to_ascii_lowercase())?;
            (&text[..at], power as u32 * 10)
        }
        _ => (text, 0),
    };
    let (whole, fraction) =
        number.split_once('.').map_or((number, None), |(whole, part)| (whole, Some(part)));
    let is_number = |digits: &str| !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit());
    if !is_number(whole) {
        return None;
    }
    let bytes = whole.parse::<u64>().ok()?.checked_mul(1 << shift)?;
    let Some(fraction) = fraction else { return Some(bytes) };
    if !is_number(fraction) || shift == 0 {
        return None;
    }
    let part = format!("0.{fraction}").parse::<f64>().ok()?;
    // Rounded as QEMU does it.
    bytes.checked_add((part * (1u64 << shift) as f64 + 0.5) as u64)
}

/// Returns how many bytes of RAM a guest has whose `-m` has this `size`, or has none.
pub(crate) fn of_memory(size: Option<&str>) -> Option<u64> {
    let Some(text) = size else { return Some(DEFAULT_MEMORY) };
    let bytes = parse(text)?;
    let unit = if text.ends_with(|last: char| last.is_ascii_digit()) { MEBIBYTE } else { 1 };
    match bytes.checked_mul(unit)?.checked_next_multiple_of(MEMORY_UNIT)? {
        // QEMU takes "-m 0" for no size at all.
        0 => Some(DEFAULT_MEMORY),
        bytes => Some(bytes),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_the_units_of_qemu() {
        for (text, bytes) in [
            ("0", 0),
            ("4096", 4096),
            ("4096b", 4096),
            ("4096B", 4096),
            ("3k", 3 << 10),
            ("2048M", 2 << 30),
            ("2g", 2 << 30),
            ("1T", 1 << 40),
            ("1p", 1 << 50),
            ("15E", 15 << 60),
            ("1.5G", 3 << 29),
            ("0.25m", 1 << 18),
            ("1.0001k", 1024),
            ("0x10", 16),
        ] {
            assert_eq!(parse(text), Some(bytes), "{text}");
        }
    }

    #[test]
    fn what_qemu_refuses_is_no_size() {
        for text in [
            "", "G", "x", "1.5", "1.5b", "1.G", ".5G", "-1G", "+1G", "1 G", "16E", "1GB", "0x", "0x1G", "1e3",
        ] {
            assert_eq!(parse(text), None, "{text}");
        }
    }

    #[test]
    fn memory_is_in_mebibytes_without_a_suffix() {
        for (text, bytes) in [
            (None, 128 << 20),
            (Some("0"), 128 << 20),
            (Some("2048"), 2 << 30),
            (Some("2G"), 2 << 30),
            (Some("1.5G"), 3 << 29),
            (Some("219136k"), 219136 << 10),
            (Some("0x400"), 1 << 30),
            // QEMU rounds these up.
            (Some("1048577B"), (1 << 20) + 8192),
            (Some("1025k"), (1 << 20) + 8192),
        ] {
            assert_eq!(of_memory(text), Some(bytes), "{text:?}");
        }
        assert_eq!(of_memory(Some("much")), None);
        assert_eq!(of_memory(Some("99999999999999999")), None);
    }
}
