//! Finding zero pages.

use memlane_protocol::PAGE_SIZE;

/// Words looked at before the next decision to stop: one cache line.
const LINE_WORDS: usize = 8;

/// Whether the page at `page` is all zero. A page that holds anything mostly shows it in its
/// first line, so that looking costs next to nothing.
///
/// # Safety
/// `page` is 8-byte aligned and its [`PAGE_SIZE`] bytes are mapped for reading.
pub unsafe fn is_zero(page: *const u8) -> bool {
    let words = page.cast::<u64>();
    (0..PAGE_SIZE as usize / 8).step_by(LINE_WORDS).all(|line| {
        let mut bits = 0;
        for word in line..line + LINE_WORDS {
            // SAFETY: within the page, see above. Volatile, since the guest may be writing: a
            // page that changes under our eyes is dirty again and comes round once more.
            bits |= unsafe { words.add(word).read_volatile() };
        }
        bits == 0
    })
}

#[cfg(test)]
mod tests {
    use super::*;

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
