//! In post-copy the source hands the guest over before all of its memory is at the destination.
//!
//! What is out of date at the destination is dropped there while the guest runs here. In the pause the source has to
//! tell only what was written since, and the VMM's state. From the moment at which the destination knows all that is
//! missing, it is served.
//!
//! Of a guest that was never looked through ([`Postcopy::Now`]) everything is missing that its memory holds as data, in
//! blocks, and everything between the blocks is made zero at the destination. In the pause the source tells which
//! blocks hold data then and did not before.
//!
//! [`Postcopy::Now`]: memlane_protocol::convergence::Postcopy::Now

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use memlane_guest::SavedState;
use memlane_net::task;
use memlane_protocol::PageSet;
use memlane_protocol::wire::control::{Control, Missing};

use super::error::CopyError;
use super::precopy::Precopy;
use super::serve::{PostcopySource, Serving};
use super::switchover::Switchover;
use super::transfer::Transfer;
use crate::missing::tell;

/// If at least this many pages are dirty, they are told once more before the pause: in the pause they would cost more
/// than another look.
const MANY: u64 = 4096;
/// There are this many looks before the pause.
const LOOKS: u32 = 3;
/// This many pages are told together (2 MiB), if one of them holds data, where it is not known which were written. So
/// few blocks, and gaps between them, are looked at again in the pause.
const BLOCK_PAGES: u64 = 512;

impl Precopy {
    /// Prepares the destination to run the guest without all of its memory, while it runs here. `tracked` says that its
    /// writes are tracked; otherwise nothing was sent yet.
    pub(super) async fn open_postcopy(&self, tracked: bool) -> Result<(), CopyError> {
        self.end_lanes().await?;
        let server = PostcopySource {
            context: self.transfer.context.clone(),
            handle: self.transfer.handle.clone(),
            ram: self.transfer.guest.ram.clone(),
            // Of a guest that was never looked through, much may be holes.
            sparse: !tracked || self.transfer.outbound.sparse.load(Ordering::Acquire),
        };
        let serving = Serving::begin(server).await?;
        self.serving.set(Some(serving));
        if !tracked {
            return self.tell_all().await;
        }
        for _ in 0..LOOKS {
            self.transfer.harvest().await?;
            if tell_dirty(&self.transfer, &self.told_missing).await? < MANY {
                break;
            }
        }
        Ok(())
    }

    /// Lets what is in flight arrive, and ends the lanes. From then on the guest's memory at the destination is written
    /// only by placing whole pages.
    async fn end_lanes(&self) -> Result<(), CopyError> {
        self.transfer.outbound.quiesce();
        while !self.transfer.outbound.is_settled() {
            self.transfer.wait_for_lanes().await?;
        }
        let closed = self.transfer.lanes.borrow().close();
        closed.await;
        Ok(())
    }

    /// Tells the destination which blocks of the guest's memory hold data, and that the rest is to be zero.
    async fn tell_all(&self) -> Result<(), CopyError> {
        let (told, ram) = (self.told_missing.clone(), self.transfer.guest.ram.clone());
        let look = move || {
            let all = 0..ram.pages();
            let blocks = ram.data_blocks(all.clone(), BLOCK_PAGES)?;
            std::io::Result::Ok((gaps(&all, &blocks), tell(&note(blocks, &told))))
        };
        let (mut holes, messages) = task::aside(look).await.map_err(CopyError::Memory)?;
        // Dealt with before what follows them, and so before the guest runs there.
        self.transfer.send_holes(&mut holes).await?;
        self.transfer.tell_missing(messages).await
    }
}

impl Switchover {
    /// Saves the state of the paused guest, and tells what was written since the last look.
    pub(super) async fn save_for_postcopy(&self) -> Result<SavedState, CopyError> {
        let saved = self.transfer.guest.driver.save().await?;
        if self.transfer.guest.tracked.get() {
            // Device models have come to rest and saved themselves: nothing is written any more.
            self.transfer.harvest().await?;
            tell_dirty(&self.transfer, &self.told_missing).await?;
        } else {
            self.tell_new_blocks().await?;
        }
        Ok(saved)
    }

    /// Tells the destination which blocks hold data that did not when they were looked at.
    async fn tell_new_blocks(&self) -> Result<(), CopyError> {
        let (told, ram) = (self.told_missing.clone(), self.transfer.guest.ram.clone());
        let look = move || {
            let known: Vec<_> = told.runs().collect();
            let parts = gaps(&(0..ram.pages()), &known).into_iter();
            let blocks = parts.map(|part| ram.data_blocks(part, BLOCK_PAGES));
            let blocks = blocks.collect::<std::io::Result<Vec<_>>>()?.concat();
            std::io::Result::Ok((!blocks.is_empty()).then(|| tell(&note(blocks, &told))))
        };
        match task::aside(look).await.map_err(CopyError::Memory)? {
            Some(messages) => self.transfer.tell_missing(messages).await,
            None => Ok(()),
        }
    }
}

impl Transfer {
    /// Returns when the destination has dropped these pages.
    async fn tell_missing(&self, messages: Vec<Missing>) -> Result<(), CopyError> {
        for missing in messages {
            self.link.send(&Control::Missing(missing)).await?;
        }
        match self.answer().await? {
            Control::MissingDone => Ok(()),
            _ => Err(CopyError::Protocol("something else than that pages are dropped")),
        }
    }
}

/// Tells the destination the dirty pages that it has not been told. Returns how many there were.
async fn tell_dirty(transfer: &Transfer, told: &Arc<PageSet>) -> Result<u64, CopyError> {
    let (told, outbound) = (told.clone(), transfer.outbound.clone());
    let look = move || {
        let fresh = PageSet::new(told.pages());
        for (word, bits) in outbound.dirty.words(0..told.pages()) {
            fresh.insert_word(word, told.insert_bits(word, bits));
        }
        (fresh.count(), tell(&fresh))
    };
    let (count, messages) = task::aside(look).await;
    transfer.tell_missing(messages).await?;
    Ok(count)
}

/// Adds blocks to what was told; returns them as a set.
fn note(blocks: Vec<Range<u64>>, told: &PageSet) -> PageSet {
    let fresh = PageSet::new(told.pages());
    for block in blocks {
        told.insert_range(block.clone());
        fresh.insert_range(block);
    }
    fresh
}

/// Returns what of `all` lies between `parts`, which are in order.
fn gaps(all: &Range<u64>, parts: &[Range<u64>]) -> Vec<Range<u64>> {
    let starts = std::iter::once(all.start).chain(parts.iter().map(|part| part.end));
    let ends = parts.iter().map(|part| part.start).chain(std::iter::once(all.end));
    starts.zip(ends).map(|(start, end)| start..end).filter(|gap| !gap.is_empty()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gaps_and_parts_make_all() {
        assert_eq!(gaps(&(0..9), &[]), vec![0..9]);
        assert_eq!(gaps(&(0..9), &[2..3, 3..5, 8..9]), [0..2, 5..8]);
        assert!(gaps(&(0..9), &[0..4, 4..9]).is_empty());
    }
}
