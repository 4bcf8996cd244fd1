//! Digests of all RAM, to prove that both hosts have the same memory of a guest.

use std::ops::Range;
use std::sync::Arc;
use std::thread;

use memlane_kvm::ram::GuestRam;
use memlane_protocol::PAGE_SIZE;
use memlane_protocol::wire::control::DIGEST_CHUNK_BYTES;
use xxhash_rust::xxh3::Xxh3;

/// One digest covers this many pages.
const CHUNK_PAGES: u64 = DIGEST_CHUNK_BYTES / PAGE_SIZE;
/// This many threads compute digests at once.
const THREADS: u64 = 4;

/// The digest of a chunk of memory: the number of the chunk, which has [`DIGEST_CHUNK_BYTES`], and the XXH3-128 of its
/// contents.
pub type Digest = (u64, u128);

/// Computes the digests of all chunks of `ram` that are not all zero, in order. Nothing may write to `ram` meanwhile.
/// Holes count as zeros and stay holes.
///
/// # Errors
///
/// Fails if the kernel cannot be asked for holes, or if memory of `ram` is gone because its file was truncated.
pub fn digest_all(ram: &Arc<GuestRam>) -> std::io::Result<Vec<Digest>> {
    let chunks = chunks(ram);
    let zeros = vec![0u8; PAGE_SIZE as usize];
    let share = chunks.div_ceil(THREADS).max(1) * CHUNK_PAGES;
    thread::scope(|scope| {
        let workers: Vec<_> = (0..THREADS)
            .map(|part| (part * share).min(ram.pages())..((part + 1) * share).min(ram.pages()))
            .map(|pages| scope.spawn(|| digest_share(ram, pages, &zeros)))
            .collect();
        let mut digests = Vec::new();
        for worker in workers {
            digests.extend(worker.join().expect("digesting does not panic")?);
        }
        ram.intact()?;
        Ok(digests)
    })
}

/// Returns the number of chunks in `ram`.
pub fn chunks(ram: &GuestRam) -> u64 {
    ram.pages().div_ceil(CHUNK_PAGES)
}

/// Computes the digests of `pages`, which begin with a chunk.
fn digest_share(ram: &GuestRam, pages: Range<u64>, zeros: &[u8]) -> std::io::Result<Vec<Digest>> {
    let of_zeros = |chunk| digest(ram, chunk, &[], zeros);
    let whole = of_zeros(0..CHUNK_PAGES);
    let extents = ram.data_extents(pages.clone())?;
    let (mut rest, mut next) = (extents.as_slice(), pages.start);
    let mut digests = Vec::new();
    while let Some(extent) = rest.first() {
        let first = next.max(extent.start / CHUNK_PAGES * CHUNK_PAGES);
        let chunk = first..(first + CHUNK_PAGES).min(pages.end);
        next = chunk.end;
        let data = &rest[..rest.partition_point(|extent| extent.start < chunk.end)];
        let found = digest(ram, chunk.clone(), data, zeros);
        let is_whole = chunk.end - chunk.start == CHUNK_PAGES;
        if found != if is_whole { whole } else { of_zeros(chunk) } {
            digests.push((first / CHUNK_PAGES, found));
        }
        rest = &rest[rest.partition_point(|extent| extent.end <= next)..];
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

/// Describes where the memories of two hosts differ; returns `None` if they do not. Both lists are in order, and chunks
/// without a digest are zero.
pub fn difference(ram: &GuestRam, mut here: &[Digest], mut there: &[Digest]) -> Option<String> {
    let (mut first, mut differing) = (None, 0);
    while let Some(chunk) = here.first().into_iter().chain(there.first()).map(|(chunk, _)| *chunk).min() {
        if take(&mut here, chunk) != take(&mut there, chunk) {
            first.get_or_insert(chunk);
            differing += 1;
        }
    }
    let address = ram.address_of(first? * CHUNK_PAGES).unwrap_or(0);
    Some(format!(
        "{differing} of {} pieces of 2 MiB differ, the first at guest address {address:#x}",
        chunks(ram)
    ))
}

/// Takes the digest of `chunk` from the front of the list, if it is the next one.
fn take(digests: &mut &[Digest], chunk: u64) -> Option<u128> {
    let ((next, digest), rest) = digests.split_first()?;
    (*next == chunk).then(|| {
        *digests = rest;
        *digest
    })
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
        // SAFETY: within the page, which no other thread uses.
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
        let numbers: Vec<u64> = digests.iter().map(|(chunk, _)| *chunk).collect();
        assert_eq!(numbers, [0, 1, 2, 3]);
        assert_eq!(difference(&here, &digests, &digest_all(&there).unwrap()), None);
        write(&there, 1280, 8);
        let text = difference(&here, &digests, &digest_all(&there).unwrap()).unwrap();
        assert!(text.contains("1 of 4 pieces") && text.contains("0x400000"), "{text}");
    }

    #[test]
    fn what_is_zero_has_no_digest_and_is_compared_all_the_same() {
        // The last piece is none of 2 MiB.
        let layout = [(0, 1 << 40), (2 << 40, 3 << 20)];
        let make = || Arc::new(GuestRam::create(&layout, &Backing::Memfd).unwrap());
        let (here, there) = (make(), make());
        let last = here.pages() - 1;
        for page in [0, 511, 100 << 18, last] {
            write(&here, page, 0);
        }
        assert_eq!(digest_all(&here).unwrap(), []);
        assert_eq!(difference(&here, &[], &digest_all(&there).unwrap()), None);
        for page in [100 << 18, last] {
            write(&there, page, 1);
            let numbers: Vec<_> = digest_all(&there).unwrap().iter().map(|(chunk, _)| *chunk).collect();
            assert_eq!(numbers, [page / CHUNK_PAGES]);
            assert!(difference(&here, &[], &digest_all(&there).unwrap()).is_some());
            assert!(difference(&there, &digest_all(&there).unwrap(), &[]).is_some());
            there.punch(page..page + 1).unwrap();
        }
    }
}
