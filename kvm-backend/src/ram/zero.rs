//! Finding zero pages.

use std::array;

use memlane_protocol::PAGE_SIZE;

use super::HostSlice;

/// The number of words that are looked at before the next decision to stop: one cache line.
const LINE_WORDS: usize = 8;
/// The number of pages whose first words are loaded at once: about as many cache lines as a core can wait for.
const AT_ONCE: usize = 16;

/// Returns for each page of `slice`, in order, whether it is all zero.
///
/// Most pages that are not zero show it in their first word, so that looking costs the wait for that word. The
/// wait is the same for several pages at once as for one.
///
/// # Safety
///
/// The slice must be mapped for reading for as long as the iterator is used.
pub unsafe fn zero_pages(slice: HostSlice) -> impl Iterator<Item = bool> {
    let pages = slice.len / PAGE_SIZE as usize;
    let mut first_words = [0; AT_ONCE];
    (0..pages).map(move |page| {
        let at = |page: usize| slice.ptr.wrapping_add(page * PAGE_SIZE as usize).cast_const();
        if page % AT_ONCE == 0 {
            // SAFETY: each address is the beginning of a page of the slice; of the last page, where there are no
            // more.
            first_words = array::from_fn(|ahead| unsafe {
                at((page + ahead).min(pages - 1)).cast::<u64>().read_volatile()
            });
        }
        // SAFETY: `at(page)` is a whole page of the slice, which consists of whole pages.
        first_words[page % AT_ONCE] == 0 && unsafe { is_zero(at(page)) }
    })
}

/// Returns whether the page at `page` is all zero. Most pages that are not zero show it in their first cache line,
/// so that looking costs next to nothing.
///
/// # Safety
///
/// `page` must be aligned to 8 bytes, and its [`PAGE_SIZE`] bytes must be mapped for reading.
pub unsafe fn is_zero(page: *const u8) -> bool {
    let words = page.cast::<u64>();
    (0..PAGE_SIZE as usize / 8).step_by(LINE_WORDS).all(|line| {
        let mut bits = 0;
        for word in line..line + LINE_WORDS {
            // SAFETY: the word lies within the page, which the caller vouches for. The read is volatile, since the
            // guest may be writing: a page that changes meanwhile is dirty again and is looked at once more.
            bits |= unsafe { words.add(word).read_volatile() };
        }
        bits == 0
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_of_a_slice_are_told_apart() {
        const WORDS: usize = PAGE_SIZE as usize / 8;
        let mut memory = vec![0u64; 70 * WORDS];
        let slice = HostSlice { ptr: memory.as_mut_ptr().cast(), len: memory.len() * 8, first_page: 5 };
        // In the first word or the last one.
        let full = |page: usize| page.is_multiple_of(3) || page == 50;
        for page in (0..70).filter(|page| full(*page)) {
            memory[page * WORDS + if page.is_multiple_of(2) { 0 } else { WORDS - 1 }] = 1;
        }
        // SAFETY: the vector is still there.
        let found: Vec<bool> = unsafe { zero_pages(slice) }.collect();
        assert_eq!(found, (0..70).map(|page| !full(page)).collect::<Vec<_>>());
    }

    #[test]
    fn sees_every_single_byte() {
        let mut page = vec![0u64; PAGE_SIZE as usize / 8];
        let look = |page: &[u64]| {
            // SAFETY: the vector is one page long and aligned.
            unsafe { is_zero(page.as_ptr().cast()) }
        };
        assert!(look(&page));
        for word in 0..page.len() {
            page[word] = 1 << (word % 64);
            assert!(!look(&page), "word {word}");
            page[word] = 0;
        }
    }
}
