//! These tests damage files: in each case a file is refused or says what it said before, and a promise is never
//! missing.

use memlane_protocol::handover::Record;
use proptest::collection::vec;
use proptest::prelude::*;

use super::entry::{Entry, Line, VmmIdentity};
use super::format::{SLOT, file, free, identity, read, read_identity, record};
use super::{earlier, tests};

const ID: [u8; 16] = [7; 16];
const SLOTS: u64 = 8;

/// Returns a file with what is done to migrations 0 to 3. `None` says that one is over.
fn written(first: u64, steps: &[(u8, Option<Record>)]) -> Vec<u8> {
    let mut bytes = file(&ID, first, SLOTS, []);
    for (step, (number, what)) in steps.iter().enumerate() {
        let slot = step + 1;
        let line = Line::new(&tests::entry(*number, Record::Committed), *what);
        bytes[slot * SLOT..][..SLOT].copy_from_slice(&record(&ID, first + slot as u64, line));
    }
    bytes
}

/// Each of these does away with a promise that the one before it has made.
fn example() -> Vec<u8> {
    written(
        40,
        &[(1, Some(Record::Prepared)), (2, Some(Record::Committed)), (1, None), (3, Some(Record::Committed))],
    )
}

#[test]
fn the_longest_entry_fits() {
    let label = "x".repeat(63);
    for record in [Record::Committed, Record::TakenBack] {
        let longest = Entry {
            migration: [0xff; 16],
            guest: label.parse().unwrap(),
            peer: label.parse().unwrap(),
            vmm: VmmIdentity { pid: u32::MAX, started: u64::MAX },
            shape: u64::MAX,
            record,
            fetching: false,
        };
        let bytes = file(&ID, u64::MAX - 1, 2, [&longest]);
        assert_eq!(read(&bytes).unwrap().entries.into_values().collect::<Vec<_>>(), [longest]);
    }
}

#[test]
fn any_bit_counts() {
    let whole = example();
    assert_eq!(read(&whole).unwrap().entries.len(), 2);
    for bit in 0..whole.len() * 8 {
        let mut damaged = whole.clone();
        damaged[bit / 8] ^= 1 << (bit % 8);
        assert!(read(&damaged).is_err(), "bit {} of byte {}", bit % 8, bit / 8);
    }
}

#[test]
fn any_cut_is_seen() {
    let whole = example();
    for cut in 0..whole.len() {
        assert!(read(&whole[..cut]).is_err(), "{cut}");
        let mut filled = whole[..cut].to_vec();
        filled.resize(whole.len(), 0);
        assert!(read(&filled).is_err(), "{cut}");
        // From here on it is lost, as with a file that was punched.
        let mut inserted = whole.clone();
        inserted.insert(cut, 0);
        assert!(read(&inserted).is_err(), "{cut}");
        inserted.pop();
        assert!(read(&inserted).is_err(), "{cut}");
        let mut removed = whole.clone();
        removed.remove(cut);
        assert!(read(&removed).is_err(), "{cut}");
    }
    assert!(read(&[&whole[..], &[0]].concat()).is_err());
    assert!(read(&[&whole[..], &free(&ID, 48)].concat()).is_err());
}

#[test]
fn any_record_that_is_doubled_moved_or_missing_is_seen() {
    let whole = example();
    let slots: Vec<&[u8]> = whole.chunks(SLOT).collect();
    for one in 0..slots.len() {
        for other in 0..slots.len() {
            if one == other {
                continue;
            }
            let mut doubled = slots.clone();
            doubled[one] = slots[other];
            assert!(read(&doubled.concat()).is_err(), "{one} is {other}");
            let mut swapped = slots.clone();
            swapped.swap(one, other);
            assert!(read(&swapped.concat()).is_err(), "{one} and {other}");
        }
        let mut removed = slots.clone();
        removed.remove(one);
        assert!(read(&removed.concat()).is_err(), "{one}");
        let more = free(&ID, 40 + SLOTS);
        removed.push(&more);
        assert!(read(&removed.concat()).is_err(), "{one}, and a free slot at the end");
        let nuls = [0; SLOT];
        let mut wiped = slots.clone();
        wiped[one] = &nuls;
        assert!(read(&wiped.concat()).is_err(), "{one}");
    }
    // As if it had never been written, and the next one had.
    for one in 1..4 {
        let free = free(&ID, 40 + one as u64);
        let mut lost = slots.clone();
        lost[one] = &free;
        assert!(read(&lost.concat()).is_err(), "{one}");
    }
    // Of another journal, or of another time.
    let other = file(&[8; 16], 40, SLOTS, []);
    let later = written(48, &[(1, Some(Record::Prepared))]);
    for (one, slot) in slots.iter().enumerate() {
        for foreign in [&other, &later] {
            let mut mixed = slots.clone();
            mixed[one] = &foreign[one * SLOT..][..SLOT];
            assert_ne!(&mixed[one], slot);
            assert!(read(&mixed.concat()).is_err(), "{one}");
        }
    }
}

fn steps() -> impl Strategy<Value = Vec<(u8, Option<Record>)>> {
    let records = prop::sample::select(vec![
        Some(Record::Prepared),
        Some(Record::Running),
        Some(Record::Committed),
        Some(Record::TakenBack),
        None,
    ]);
    vec((0..4_u8, records), 0..SLOTS as usize)
}

proptest! {
    /// Bytes of any kind are written over by others.
    #[test]
    fn overwritten(
        steps in steps(),
        first in 0..1000_u64,
        at in 0..SLOTS as usize * SLOT,
        with in vec(any::<u8>(), 1..64),
    ) {
        let whole = written(first, &steps);
        let before = read(&whole).unwrap();
        prop_assert_eq!(before.taken, 1 + steps.len() as u64);
        let mut damaged = whole.clone();
        let end = (at + with.len()).min(whole.len());
        damaged[at..end].copy_from_slice(&with[..end - at]);
        prop_assert!(read(&damaged).is_err() || damaged == whole);
    }

    /// A piece of a file lies in a place of another, at any byte.
    #[test]
    fn displaced(
        steps in steps(),
        from in 0..SLOTS as usize * SLOT,
        to in 0..SLOTS as usize * SLOT,
        length in 1..2 * SLOT,
    ) {
        let whole = written(1, &steps);
        let length = length.min(whole.len() - from.max(to));
        let mut damaged = whole.clone();
        damaged[to..to + length].copy_from_slice(&whole[from..from + length]);
        prop_assert!(read(&damaged).is_err() || damaged == whole);
    }

    /// These files never were journals.
    #[test]
    fn anything(bytes in vec(any::<u8>(), 0..3 * SLOT), text in ".{0,300}") {
        for bytes in [&bytes[..], text.as_bytes(), &[&example()[..SLOT], &bytes].concat()] {
            prop_assert!(read(bytes).is_err());
            prop_assert!(read_identity(bytes).is_err());
        }
        let whole = [&identity(&ID)[..], &bytes].concat();
        prop_assert_eq!(read_identity(&whole).is_ok(), bytes.is_empty());
        // A format without sums can be refused or believed.
        let _ = earlier::read(&bytes);
        let _ = earlier::read(text.as_bytes());
    }
}
