//! Digests of all RAM, to prove that both ends hold the same.

use std::ops::Range;
use std::sync::Arc;
use std::thread;

use memlane_kvm::ram::GuestRam;
use memlane_protocol::PAGE_SIZE;
use memlane_protocol::wire::control::DIGEST_CHUNK_BYTES;
use xxhash_rust::xxh3::Xxh3;

/// Pages under one digest.
const CHUNK_PAGES: u64 = DIGEST_CHUNK_BYTES / PAGE_SIZE;
/// Threads that digest.
const THREADS: u64 = 4;

/// XXH3-128 of every [`DIGEST_CHUNK_BYTES`] of `ram`, in order. Nothing may write to it
/// meanwhile. Holes count as zeros and stay holes.
pub fn digest_all(ram: &Arc<GuestRam>) -> std::io::Result<Vec<u128>> {
    let chunks = ram.pages().div_ceil(CHUNK_PAGES);
    let zeros = vec![0u8; PAGE_SIZE as usize];
    let zero_chunk = {
        let mut hash = Xxh3::new();
        (0..CHUNK_PAGES).for_each(|_| hash.update(&zeros));
        hash.digest128()
    };
    let share = chunks.div_ceil(THREADS).max(1) * CHUNK_PAGES;
    thread::scope(|scope| {
        let workers: Vec<_> = (0..THREADS)
            .map(|part| (part * share).min(ram.pages())..((part + 1) * share).min(ram.pages()))
            .map(|pages| scope.spawn(|| digest_share(ram, pages, &zeros, zero_chunk)))
            .collect();
        let mut digests = Vec::with_capacity(chunks as usize);
        for worker in workers {
            digests.extend(worker.join().expect("digesting does not panic")?);
        }
        Ok(digests)
    })
}

/// The digests of `pages`, which begin with a chunk.
fn digest_share(
    ram: &GuestRam,
    pages: Range<u64>,
    zeros: &[u8],
    zero_chunk: u128,
) -> std::io::Result<Vec<u128>> {
    let extents = ram.data_extents(pages.clone())?;
    let mut rest = extents.as_slice();
    let mut digests = Vec::new();
    for first in pages.clone().step_by(CHUNK_PAGES as usize) {
        let chunk = first..(first + CHUNK_PAGES).min(pages.end);
        rest = &rest[rest.partition_point(|extent| extent.end <= chunk.start)..];
        let data = &rest[..rest.partition_point(|extent| extent.start < chunk.end)];
        let whole = chunk.end - chunk.start == CHUNK_PAGES;
        digests.push(if data.is_empty() && whole { zero_chunk } else { digest(ram, chunk, data, zeros) });
    }
    Ok(digests)
}

/// The digest of `chunk`, of which `data` covers all that is not zero.
fn digest(ram: &GuestRam, chunk: Range<u64>, data: &[Range<u64>], zeros: &[u8]) -> u128 {
    let mut hash = Xxh3::new();
    let mut next = chunk.start;
    for extent in data {
        let extent = extent.start.max(chunk.start)..extent.end.min(chunk.end);
        (next..extent.start).for_each(|_| hash.update(zeros));
        next = extent.end;
        for slice in ram.slices(extent) {
            // SAFETY: mapped as long as `ram` lives, and nothing writes to it, as the caller
            // promises: the guest is paused here, and has not begun to run there.
            hash.update(unsafe { std::slice::from_raw_parts(slice.ptr, slice.len) });
        }
    }
    (next..chunk.end).for_each(|_| hash.update(zeros));
    hash.digest128()
}

/// Says where two lists of digests differ, or nothing if they do not.
pub fn difference(ram: &GuestRam, here: &[u128], there: &[u128]) -> Option<String> {
    if here.len() != there.len() {
        return Some(format!("{} digests here, {} there", here.len(), there.len()));
    }
    let differing: Vec<u64> =
        (0..).zip(here.iter().zip(there)).filter(|(_, (a, b))| a != b).map(|(chunk, _)| chunk).collect();
    let first = *differing.first()?;
    let address = ram.address_of(first * CHUNK_PAGES).unwrap_or(0);
    Some(format!(
        "{} of {} pieces of 2 MiB differ, the first at guest address {address:#x}",
        differing.len(),
        here.len()
    ))
}

#[cfg(test)]
mod tests {
    use memlane_kvm::ram::Backing;
    use memlane_kvm::ram::GuestRam;

    use super::*;

    fn ram() -> Arc<GuestRam> {
        Arc::new(GuestRam::create(&[(0, 5 << 20), (16 << 20, 3 << 20)], &Backing::Memfd).unwrap())
    }

    fn write(ram: &GuestRam, page: u64, byte: u8) {
        let slice = ram.slices(page..page + 1).next().unwrap();
        // SAFETY: within the page, which nobody else uses.
        unsafe { slice.ptr.write_bytes(byte, PAGE_SIZE as usize) };
    }

    #[test]
    fn holes_and_zeros_are_the_same_and_one_byte_is_not() {
        let (here, there) = (ram(), ram());
        for page in [3, 700, 1279, 1280, 2047] {
            write(&here, page, 7);
            write(&there, page, 7);
        }
        write(&there, 1000, 0);
        let digests = digest_all(&here).unwrap();
        assert_eq!(digests.len(), 4);
        assert_eq!(difference(&here, &digests, &digest_all(&there).unwrap()), None);
        write(&there, 1280, 8);
        let text = difference(&here, &digests, &digest_all(&there).unwrap()).unwrap();
        assert!(text.contains("1 of 4 pieces") && text.contains("0x400000"), "{text}");
    }
}
