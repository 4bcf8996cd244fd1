//! This module reads and writes the bytes of a journal.
//!
//! A file is a number of slots of 512 bytes that never changes, each a line of text: a JSON object, spaces, and a
//! newline. The first slot is the header; records follow, and after them free slots. Every slot carries its number, which goes
//! on by one from slot to slot (and from file to file), and a CRC32C over the journal's identity and all its other bytes.
//! The sum comes first and has exactly one spelling, so that every bit of the file counts.

use std::collections::BTreeMap;

use memlane_api::ids;
use memlane_protocol::wire::attach::MigrationId;
use serde::{Deserialize, Serialize};

use super::entry::{Change, Entry, Key, Line};
use super::error::Fault;

/// A slot has this many bytes, which disks write whole or not at all.
pub(super) const SLOT: usize = 512;
/// Files are written in this format.
pub(super) const FORMAT: u64 = 2;
/// Every slot begins with this text.
pub(super) const BEGINNING: &str = "{\"sum\":\"";
/// The sum has this many digits.
const DIGITS: usize = 8;
/// The sum covers the slot's bytes from this one on.
const SUMMED: usize = BEGINNING.len() + DIGITS;

/// Each journal has an identity, by which it is told apart from others.
pub(super) type JournalId = MigrationId;

/// A journal as it is found in a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Contents {
    /// This is the journal's identity, by which it is told apart from others.
    pub id: JournalId,
    /// This is the number of the header's slot.
    pub first: u64,
    /// The file has this many slots, with the header.
    pub slots: u64,
    /// This many slots are taken, with the header.
    pub taken: u64,
    /// These are the migrations that are not over.
    pub entries: BTreeMap<Key, Entry>,
}

#[derive(Serialize, Deserialize)]
struct Header {
    memlane: String,
    format: u64,
    journal: String,
    slots: u64,
    sequence: u64,
}

#[derive(Serialize, Deserialize)]
struct Identity {
    memlane: String,
    journal: String,
}

#[derive(Serialize, Deserialize)]
struct Slot {
    sequence: u64,
    /// With `None` the slot is free.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    entry: Option<Line>,
}

impl Contents {
    /// Returns the bytes of a file that says the same, in which only the slots of migrations that are not over are taken.
    ///
    /// # Panics
    ///
    /// Panics if there are fewer slots than the header and all entries need.
    pub fn file(&self) -> Vec<u8> {
        file(&self.id, self.first, self.slots, self.entries.values())
    }
}

/// Returns the file of the journal `id`, whose header has the number `first`, with `entries` and free slots after them.
pub(super) fn file<'a>(
    id: &JournalId,
    first: u64,
    slots: u64,
    entries: impl IntoIterator<Item = &'a Entry>,
) -> Vec<u8> {
    let header = Header {
        memlane: "journal".to_owned(),
        format: FORMAT,
        journal: ids::encode(id),
        slots,
        sequence: first,
    };
    let mut bytes = Vec::with_capacity(slots as usize * SLOT);
    bytes.extend(slot(id, &header));
    let mut entries = entries.into_iter();
    for number in 1..slots {
        let sequence = first.wrapping_add(number);
        bytes.extend(match entries.next() {
            Some(entry) => record(id, sequence, Line::new(entry, Some(entry.record))),
            None => free(id, sequence),
        });
    }
    assert!(entries.next().is_none(), "there are slots for all entries");
    bytes
}

/// Returns the file beside the journal, one slot long, which says that there is a journal, and which one.
pub(super) fn identity(id: &JournalId) -> Vec<u8> {
    slot(id, &Identity { memlane: "journal-identity".to_owned(), journal: ids::encode(id) })
}

/// Reads what [`identity`] wrote.
///
/// # Errors
///
/// Fails if these bytes are anything else.
pub(super) fn read_identity(bytes: &[u8]) -> Result<JournalId, Fault> {
    let read: Option<Identity> = serde_json::from_slice(bytes).ok();
    let read = read.filter(|read| read.memlane == "journal-identity" && bytes.len() == SLOT);
    let id = read.and_then(|read| ids::decode(&read.journal)).filter(|id| is_summed(id, bytes));
    id.ok_or_else(|| damaged(0, format!("this is not the name of a journal: {}", excerpt(bytes))))
}

/// Returns the bytes of a slot with a record.
pub(super) fn record(id: &JournalId, sequence: u64, line: Line) -> Vec<u8> {
    slot(id, &Slot { sequence, entry: Some(line) })
}

/// Returns the bytes of a free slot.
pub(super) fn free(id: &JournalId, sequence: u64) -> Vec<u8> {
    slot(id, &Slot { sequence, entry: None })
}

fn slot(id: &JournalId, body: &impl Serialize) -> Vec<u8> {
    let body = serde_json::to_vec(body).expect("strings and numbers always become JSON");
    let mut bytes = Vec::with_capacity(SLOT);
    bytes.extend(BEGINNING.bytes());
    bytes.extend([b'0'; DIGITS]);
    bytes.extend(b"\",");
    bytes.extend(&body[1..]);
    assert!(bytes.len() < SLOT, "the lengths of all that is in an entry are bounded");
    bytes.resize(SLOT - 1, b' ');
    bytes.push(b'\n');
    let sum = sum(id, &bytes);
    bytes[BEGINNING.len()..SUMMED].copy_from_slice(sum.as_bytes());
    bytes
}

fn sum(id: &JournalId, slot: &[u8]) -> String {
    format!("{:0DIGITS$x}", crc32c::crc32c_append(crc32c::crc32c(id), &slot[SUMMED..]))
}

fn is_summed(id: &JournalId, slot: &[u8]) -> bool {
    slot.starts_with(BEGINNING.as_bytes()) && slot[BEGINNING.len()..SUMMED] == *sum(id, slot).as_bytes()
}

/// Reads the bytes of a whole file.
///
/// # Errors
///
/// Fails if any byte of it is not as it was written, or if the format is a later one.
pub fn read(bytes: &[u8]) -> Result<Contents, Fault> {
    let Some(first) = bytes.get(..SLOT) else {
        let found = format!("the file ends here, within its header of {SLOT} bytes");
        return Err(damaged(bytes.len(), found));
    };
    let header = header(first)?;
    let id = ids::decode(&header.journal).filter(|id| is_summed(id, first));
    let Some(id) = id else {
        return Err(damaged(0, format!("the header's sum is wrong: {}", excerpt(first))));
    };
    if header.format != FORMAT {
        return Err(Fault::Later(header.format));
    }

    let mut entries = BTreeMap::new();
    let mut taken = None;
    let slots = bytes.chunks(SLOT).enumerate().skip(1);
    for (number, text) in slots.take_while(|(number, _)| (*number as u64) < header.slots) {
        let at = number * SLOT;
        if text.len() < SLOT {
            break;
        }
        let slot = parse(&id, text, at)?;
        let expected = header.sequence.wrapping_add(number as u64);
        if slot.sequence != expected {
            return Err(damaged(at, format!("record {} is here, where {expected} belongs", slot.sequence)));
        }
        let Some(line) = slot.entry else {
            taken.get_or_insert(number as u64);
            continue;
        };
        if let Some(missing) = taken {
            let missing = header.sequence.wrapping_add(missing);
            return Err(damaged(
                at,
                format!("record {expected} is here, and record {missing} before it is missing"),
            ));
        }
        match line.change().map_err(|error| damaged(at, error.to_string()))? {
            Change::Set(entry) => entries.insert(entry.key(), entry),
            Change::Forget(key) => entries.remove(&key),
        };
    }
    let length = header.slots.checked_mul(SLOT as u64);
    match length {
        Some(length) if (bytes.len() as u64) < length => {
            return Err(damaged(bytes.len(), format!("the file ends here, and it was {length} bytes long")));
        }
        Some(length) if (bytes.len() as u64) > length => {
            return Err(damaged(
                length as usize,
                format!("the file goes on here, and it was {length} bytes long"),
            ));
        }
        Some(_) => {}
        None => return Err(damaged(0, format!("the header speaks of {} records", header.slots))),
    }
    let taken = taken.unwrap_or(header.slots);
    Ok(Contents { id, first: header.sequence, slots: header.slots, taken, entries })
}

/// Reads the header without looking at its sum.
fn header(text: &[u8]) -> Result<Header, Fault> {
    let header: Option<Header> = serde_json::from_slice(text).ok();
    let header = header.filter(|header| header.memlane == "journal" && header.slots > 0);
    header.ok_or_else(|| damaged(0, format!("this is no journal's header: {}", excerpt(text))))
}

/// Reads a slot that begins `at` so many bytes from the file's beginning.
fn parse(id: &JournalId, text: &[u8], at: usize) -> Result<Slot, Fault> {
    let wrong = |why: &str| damaged(at, format!("{why}: {}", excerpt(text)));
    if !is_summed(id, text) {
        return Err(wrong("this record's sum is wrong, or it is another journal's"));
    }
    serde_json::from_slice(text).map_err(|error| wrong(&format!("the record makes no sense ({error})")))
}

fn damaged(offset: usize, found: String) -> Fault {
    Fault::Damaged { offset: offset as u64, found }
}

/// Returns the first bytes as text without control characters.
pub(super) fn excerpt(bytes: &[u8]) -> String {
    const SHOWN: usize = 320;
    let text = String::from_utf8_lossy(&bytes[..bytes.len().min(SHOWN)]);
    format!("`{}`", text.trim_end().escape_debug())
}
