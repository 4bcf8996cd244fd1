//! The kernel's pool of huge pages.

use std::fs::{self, File};

use anyhow::{Context, Result, bail};
use rustix::fs::FlockOperation;

use crate::cleanup::Registration;

/// The kernel's pool of 2 MiB pages; see Documentation/admin-guide/mm/hugetlbpage.rst.
const POOL: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages";

/// 2 MiB pages added to the kernel's pool, taken back when this is dropped. Root is needed.
#[derive(Debug)]
pub struct HugePages {
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
        let before = read()?;
        write(before.saturating_add(count))?;
        // The kernel takes what it finds, without an error.
        let found = read()?.saturating_sub(before);
        if found < count {
            write(before)?;
            bail!(
                "the kernel found {found} of {count} huge pages (2 MiB each): free memory, or reserve them at boot"
            );
        }
        Ok(Self { _cleanup: Registration::new(move || give_back(count)) })
    }
}

fn give_back(count: u64) {
    let _guard = lock();
    // Subtracted rather than reset: another guard may have added its own meanwhile. Best effort, as all cleaning up.
    if let Ok(pages) = read() {
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

fn read() -> Result<u64> {
    let text = fs::read_to_string(POOL).with_context(|| format!("reading {POOL}"))?;
    text.trim().parse().with_context(|| format!("{POOL} says {:?}, which is no number", text.trim()))
}
