//! The format before there were sums: lines of JSON, and NULs after them as room for more.
//!
//! It is read once, by the first daemon of a version that knows sums, and written anew. Since it cannot tell a line that was
//! torn from one that is damaged, what does not add up is not believed, be it at the end.

use std::collections::BTreeMap;

use super::entry::{Change, Entry, Key, Line};
use super::error::Fault;
use super::format::excerpt;

/// No line is longer: the longest entry takes about 350 bytes.
const MAX_LINE_BYTES: usize = 512;

/// Reads the bytes of a whole file in the format before there were sums.
///
/// # Errors
///
/// Fails if anything in it does not add up.
pub fn read(bytes: &[u8]) -> Result<BTreeMap<Key, Entry>, Fault> {
    let damaged = |offset: usize, found: String| Fault::Damaged { offset: offset as u64, found };
    let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    let mut entries = BTreeMap::new();
    let mut at = 0;
    for text in bytes[..end].split_inclusive(|byte| *byte == b'\n') {
        if !text.ends_with(b"\n") {
            return Err(damaged(at, format!("this line has no end: {}", excerpt(text))));
        }
        // Complaints about a line repeat what stands in it.
        if text.len() > MAX_LINE_BYTES {
            return Err(damaged(at, format!("this line is longer than an entry can be: {}", excerpt(text))));
        }
        let line: Line = serde_json::from_slice(text)
            .map_err(|error| damaged(at, format!("this is no journal entry ({error}): {}", excerpt(text))))?;
        match line.change().map_err(|error| damaged(at, error.to_string()))? {
            Change::Set(entry) => entries.insert(entry.key(), entry),
            Change::Forget(key) => entries.remove(&key),
        };
        at += text.len();
    }
    if let Some(more) = bytes[end..].iter().position(|byte| *byte != 0) {
        let found = format!("after {more} NULs there is more: {}", excerpt(&bytes[end + more..]));
        return Err(damaged(end + more, found));
    }
    if bytes.is_empty() {
        return Err(damaged(0, "the file is empty".to_owned()));
    }
    Ok(entries)
}
