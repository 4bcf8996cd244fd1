//! The kernel's pool of huge pages.

use std::fs::{self, File};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use rustix::fs::FlockOperation;

use crate::cleanup::Registration;
use crate::wait::wait_for;

/// The kernel's pool of 2 MiB pages; see Documentation/admin-guide/mm/hugetlbpage.rst.
const POOL: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages";
/// The number of pages in the pool that nobody uses.
const FREE: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages";
/// The longest wait for a daemon to let go of the memory of a guest that is gone.
const RELEASE: Duration = Duration::from_secs(60);

/// 2 MiB pages added to the kernel's pool, taken back when this is dropped. Root is needed.
#[derive(Debug)]
pub struct HugePages {
    count: u64,
    _cleanup: Registration,
}

impl HugePages {
    /// Adds `count` pages of 2 MiB to the pool.
    ///
    /// # Errors
    ///
    /// If the pool cannot be changed, or the kernel does not find that many pages in one piece.
    pub fn reserve(count: u64) -> Result<Self> {
        let _guard = lock()?;
        let before = read(POOL)?;
        write(before.saturating_add(count))?;
        // The kernel takes what it finds, without an error.
        let found = read(POOL)?.saturating_sub(before);
        if found < count {
            write(before)?;
            bail!(
                "the kernel found {found} of {count} huge pages (2 MiB each): free memory, or reserve them at boot"
            );
        }
        Ok(Self { count, _cleanup: Registration::new(move || give_back(count)) })
    }

    /// Waits until all of these pages are free again. A daemon lets go of a guest's memory a moment after its VMM has
    /// ended, and the next guest finds no pages until then.
    ///
    /// # Errors
    ///
    /// If some are still in use after a minute.
    pub fn wait_until_free(&self) -> Result<()> {
        wait_for("free huge pages", RELEASE, || read(FREE).is_ok_and(|free| free >= self.count).then_some(()))
    }
}

fn give_back(count: u64) {
    let _guard = lock();
    // Subtracted rather than reset: another guard may have added its own meanwhile. Best effort, as all cleaning up.
    if let Ok(pages) = read(POOL) {
        let _ = write(pages.saturating_sub(count));
    }
}

/// Takes the lock of the pool. No other process that takes this lock changes the pool until it is dropped.
fn lock() -> Result<File> {
    let pool = File::open(POOL).with_context(|| format!("opening {POOL}"))?;
    rustix::fs::flock(&pool, FlockOperation::LockExclusive).with_context(|| format!("locking {POOL}"))?;
    Ok(pool)
}

fn write(pages: u64) -> Result<()> {
    fs::write(POOL, pages.to_string()).with_context(|| format!("writing {POOL}"))
}

fn read(file: &str) -> Result<u64> {
    let text = fs::read_to_string(file).with_context(|| format!("reading {file}"))?;
    text.trim().parse().with_context(|| format!("{file} says {:?}, which is no number", text.trim()))
}
