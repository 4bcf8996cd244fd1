//! The file of the journal.

use memlane_net::journal::{Contents, Fault, read, read_earlier};
use memlane_protocol::wire::is_obeyed;

/// A slot has this many bytes.
const SLOT: usize = 512;
/// Every slot begins with this text, which eight digits of the sum follow.
const BEGINNING: &[u8] = b"{\"sum\":\"";
const SUM: std::ops::Range<usize> = BEGINNING.len()..BEGINNING.len() + 8;
/// The header's identity of the journal follows this text.
const IDENTITY: &[u8] = b"\"journal\":\"";

/// Reads bytes as a daemon that starts reads its journal: as they are, as though all their sums were right, and in the
/// format of earlier versions.
pub fn journal(bytes: &[u8]) {
    check(bytes);
    if let Some(summed) = summed(bytes) {
        check(&summed);
    }
    match read_earlier(bytes) {
        Ok(entries) => assert_eq!(read_earlier(bytes), Ok(entries)),
        Err(fault) => check_fault(&fault, bytes),
    }
}

fn check(bytes: &[u8]) {
    let contents = match read(bytes) {
        Ok(contents) => contents,
        Err(fault) => return check_fault(&fault, bytes),
    };
    assert_eq!(read(bytes).as_ref(), Ok(&contents), "it says the same each time");
    assert_eq!(contents.slots.checked_mul(SLOT as u64), Some(bytes.len() as u64));
    assert!((contents.entries.len() as u64) < contents.taken && contents.taken <= contents.slots);
    assert!(contents.entries.iter().all(|(key, entry)| entry.key() == *key));
    let file = contents.file();
    assert_eq!(file.len(), bytes.len());
    let taken = 1 + contents.entries.len() as u64;
    assert_eq!(read(&file), Ok(Contents { taken, ..contents }), "and once it was written anew");
    // A promise never goes missing: no file is believed that ends early.
    for slot in 0..bytes.len() / SLOT {
        assert!(read(&bytes[..slot * SLOT]).is_err());
    }
}

fn check_fault(fault: &Fault, bytes: &[u8]) {
    let Fault::Damaged { offset, found } = fault else { return };
    assert!(*offset <= bytes.len() as u64, "byte {offset} of {}", bytes.len());
    assert!(!found.contains(is_obeyed), "a terminal would obey {found:?}");
    assert!(found.len() < 8 << 10, "{} bytes", found.len());
}

/// Returns the bytes with sums that are right, if there is a header that says of which journal. No fuzzer guesses sums, and
/// what is behind them must hold all the same.
fn summed(bytes: &[u8]) -> Option<Vec<u8>> {
    let header = bytes.get(..SLOT)?;
    let digits = header.windows(IDENTITY.len()).position(|window| window == IDENTITY)? + IDENTITY.len();
    let id = std::str::from_utf8(header.get(digits..digits + 32)?).ok()?;
    let id = memlane_api::ids::decode(id)?;
    let mut bytes = bytes.to_vec();
    for slot in bytes.chunks_exact_mut(SLOT) {
        slot[..BEGINNING.len()].copy_from_slice(BEGINNING);
        let sum = crc32c::crc32c_append(crc32c::crc32c(&id), &slot[SUM.end..]);
        slot[SUM].copy_from_slice(format!("{sum:08x}").as_bytes());
    }
    Some(bytes)
}
