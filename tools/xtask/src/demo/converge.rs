//! The figures of a guest that wrote faster than the ports carry: how it was brought to its destination.

use std::fmt::Write;

use memlane_lab::Readers;
use serde_json::{Value, json};

use super::format::{thousands, time};

/// Returns the figures of post-copy for programs; null if there was none.
pub(crate) fn postcopy(migration: &Value) -> Value {
    let postcopy = &migration["postcopy"];
    if !postcopy.is_object() {
        return Value::Null;
    }
    pick(
        postcopy,
        &[
            "faults",
            "fault_p50_us",
            "fault_p99_us",
            "fault_max_us",
            "pages_fetched",
            "pages_streamed",
            "seconds",
        ],
    )
}

/// Returns the figures of stun for programs, with its cost for the readers; null if there was none.
pub(crate) fn stun(migration: &Value, readers: Option<&Readers>) -> Value {
    let stun = &migration["stun"];
    if !stun.is_object() {
        return Value::Null;
    }
    let keys = ["seconds", "released_pages_per_second", "target_pages_per_second", "switch_seconds"];
    let mut object = pick(stun, &keys);
    object["reader_slowdown_percent"] = json!(readers.and_then(Readers::slowdown_percent));
    object
}

/// Writes the figures of stun and of post-copy for people: a line or two for each that there was.
pub(crate) fn write(text: &mut String, migration: &Value, readers: Option<&Readers>) -> std::fmt::Result {
    let stun = stun(migration, readers);
    if stun.is_object() {
        let pages = |key: &str| stun[key].as_f64().map_or("—".to_owned(), |pages| thousands(pages as u64));
        writeln!(
            text,
            "  its writes were slowed for {}, which took {} to begin: {} pages a second were let through, {} aimed at",
            spent(&stun["seconds"]),
            spent(&stun["switch_seconds"]),
            pages("released_pages_per_second"),
            pages("target_pages_per_second"),
        )?;
        if let Some(percent) = stun["reader_slowdown_percent"].as_f64() {
            match percent {
                0.0.. => writeln!(text, "  that cost vCPUs that only read {percent:.1} % of their speed")?,
                _ => writeln!(text, "  vCPUs that only read were faster by {:.1} % meanwhile", -percent)?,
            }
        }
    }
    let postcopy = postcopy(migration);
    if postcopy.is_object() {
        let number = |key: &str| thousands(postcopy[key].as_u64().unwrap_or(0));
        let micros = |key: &str| postcopy[key].as_f64().map_or("—".to_owned(), |micros| time(micros / 1e6));
        writeln!(
            text,
            "  it ran there for {} with pages still here: {} were fetched as it asked, {} streamed",
            spent(&postcopy["seconds"]),
            number("pages_fetched"),
            number("pages_streamed"),
        )?;
        writeln!(
            text,
            "  it waited for pages {} times: {} in the median, {} in all but one of a hundred, {} at the longest",
            number("faults"),
            micros("fault_p50_us"),
            micros("fault_p99_us"),
            micros("fault_max_us"),
        )?;
    }
    Ok(())
}

fn spent(seconds: &Value) -> String {
    seconds.as_f64().map_or("—".to_owned(), time)
}

fn pick(from: &Value, keys: &[&str]) -> Value {
    keys.iter().map(|key| ((*key).to_owned(), from[*key].clone())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_there_was_is_told_and_nothing_else() {
        let plain = json!({ "outcome": "completed", "postcopy": null });
        assert_eq!((postcopy(&plain), stun(&plain, None)), (Value::Null, Value::Null));
        let mut text = String::new();
        write(&mut text, &plain, None).unwrap();
        assert_eq!(text, "");

        let both = json!({
            "stun": {
                "seconds": 3.5,
                "released_pages_per_second": 58_000.4,
                "target_pages_per_second": 58_200.0,
                "switch_seconds": 0.0021,
            },
            "postcopy": {
                "faults": 1234,
                "fault_p50_us": 180.0,
                "fault_p99_us": 900.0,
                "fault_max_us": 2100.0,
                "pages_fetched": 1200,
                "pages_streamed": 65_536,
                "seconds": 1.25,
                "remaining_pages": 0,
            },
        });
        assert_eq!(stun(&both, None)["reader_slowdown_percent"], Value::Null);
        assert_eq!(postcopy(&both).as_object().unwrap().len(), 7);
        write(&mut text, &both, None).unwrap();
        for part in [
            "slowed for 3.50 s, which took 2.1 ms to begin: 58,000 pages a second",
            "58,200 aimed at",
            "for 1.25 s with pages still here: 1,200 were fetched as it asked, 65,536 streamed",
            "1,234 times: 180 µs in the median, 900 µs in all but one of a hundred, 2.1 ms at the longest",
        ] {
            assert!(text.contains(part), "{text}");
        }
        assert!(!text.contains("only read"), "{text}");
    }
}
