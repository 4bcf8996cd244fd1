//! Digests of all RAM, to prove that both ends hold the same.

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
    let share = chunks.div_ceil(THREADS).max(1);
    let parts: Vec<_> = (0..THREADS).map(|part| part * share..((part + 1) * share).min(chunks)).collect();
    thread::scope(|scope| {
        let workers: Vec<_> = parts
            .into_iter()
            .map(|part| {
                let zeros = &zeros;
                scope.spawn(move || part.map(|chunk| digest(ram, chunk, zeros, zero_chunk)).collect())
            })
            .collect();
        let mut digests = Vec::with_capacity(chunks as usize);
        for worker in workers {
            let part: std::io::Result<Vec<u128>> = worker.join().expect("digesting does not panic");
            digests.extend(part?);
        }
        Ok(digests)
    })
}

fn digest(ram: &GuestRam, chunk: u64, zeros: &[u8], zero_chunk: u128) -> std::io::Result<u128> {
    let first = chunk * CHUNK_PAGES;
    let end = (first + CHUNK_PAGES).min(ram.pages());
    let data = ram.data_extents(first..end)?;
    if data.is_empty() && end - first == CHUNK_PAGES {
        return Ok(zero_chunk);
    }
    let mut hash = Xxh3::new();
    let mut next = first;
    for extent in data {
        (next..extent.start).for_each(|_| hash.update(zeros));
        next = extent.end;
        for slice in ram.slices(extent) {
            // SAFETY: mapped as long as `ram` lives, and nothing writes to it, as the caller
            // promises: the guest is paused here, and has not begun to run there.
            hash.update(unsafe { std::slice::from_raw_parts(slice.ptr, slice.len) });
        }
    }
    (next..end).for_each(|_| hash.update(zeros));
    Ok(hash.digest128())
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
