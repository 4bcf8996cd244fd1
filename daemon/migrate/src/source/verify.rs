//! This module proves that both ends hold the same memory, where that was ordered.

use memlane_lane::digest::{Digest, chunks, difference, digest_all};
use memlane_protocol::wire::control::Control;

use super::error::CopyError;
use super::switchover::Switchover;

impl Switchover {
    /// Compares digests of all RAM at both ends, while the guest is paused.
    ///
    /// # Errors
    ///
    /// Fails if they differ, or if the destination does not send its own.
    pub(super) async fn compare(&self) -> Result<(), CopyError> {
        self.transfer.link.send(&Control::Verify).await?;
        let ram = self.transfer.guest.ram.clone();
        let digesting = tokio::task::spawn_blocking(move || digest_all(&ram));
        let mut there = Vec::new();
        loop {
            let Control::Digests { digests, last } = self.transfer.answer().await? else {
                return Err(CopyError::Protocol("something else than its digests"));
            };
            let known = there.len();
            there.extend(digests);
            let from = known.saturating_sub(1);
            let in_order = there[from..].is_sorted_by(|before: &Digest, after| before.0 < after.0);
            if !in_order || there.last().is_some_and(|(chunk, _)| *chunk >= chunks(&self.transfer.guest.ram))
            {
                return Err(CopyError::Protocol("digests that are out of order, or of no memory"));
            }
            if last {
                break;
            }
            if there.len() == known {
                return Err(CopyError::Protocol("no digests where some are left"));
            }
        }
        let here = digesting.await.expect("digesting does not panic").map_err(CopyError::Memory)?;
        let difference = difference(&self.transfer.guest.ram, &here, &there);
        self.transfer.handle.update(|progress| progress.pause.digest_verified = Some(difference.is_none()));
        match difference {
            Some(difference) => Err(CopyError::Unequal(difference)),
            None => Ok(()),
        }
    }
}
