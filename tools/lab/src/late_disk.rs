//! A disk whose reads end late, as those of a slow device do.
//!
//! It is a file in a file system of this process (FUSE) that bypasses the page cache: the kernel pins the pages that are
//! to be read into, and fills them when the answer comes. Page tables tell only of the first.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result};
use fuser::{
    BackgroundSession, Config, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation,
    INodeNo, LockOwner, OpenFlags, ReplyAttr, ReplyData, ReplyEntry, ReplyOpen, Request, SessionACL,
};
use rustix::mount::{UnmountFlags, unmount};

use crate::cleanup::Registration;
use crate::size::Size;

/// The name of the file.
const NAME: &str = "disk";
const DISK: INodeNo = INodeNo(2);
/// The kernel may remember for this long what it has been told.
const REMEMBERED: Duration = Duration::from_secs(3600);

/// A disk whose reads end late. It goes when this is dropped, or on a signal.
#[derive(Debug)]
pub struct LateDisk {
    file: PathBuf,
    reads: Arc<Reads>,
    _mounted: Registration,
    _session: BackgroundSession,
}

impl LateDisk {
    /// Makes a disk that no program can write. Each read of it takes `delay`. Every word of 8 bytes on it follows from its
    /// place, and the guest's program knows how. Programs of a lab see it if they are started afterwards.
    ///
    /// # Errors
    ///
    /// If the kernel has no FUSE, or this process is not root.
    pub fn make(size: Size, delay: Duration) -> Result<Self> {
        let directory = tempfile::Builder::new().prefix("memlane-late-disk-").tempdir();
        let directory = directory.context("making a directory")?.keep();
        let mounted = directory.clone();
        let mounted = Registration::new(move || {
            // It was never mounted, is gone already, or nothing can be done about it.
            let _ = unmount(&mounted, UnmountFlags::DETACH);
            let _ = std::fs::remove_dir(&mounted);
        });
        let mut config = Config::default();
        // QEMU is another user.
        config.acl = SessionACL::All;
        let reads = Arc::new(Reads::default());
        let files = Files { bytes: size.bytes(), delay, reads: reads.clone() };
        let session = fuser::spawn_mount(files, &directory, &config)
            .with_context(|| format!("mounting a FUSE file system at {}", directory.display()))?;
        Ok(Self { file: directory.join(NAME), reads, _mounted: mounted, _session: session })
    }

    /// Says how many reads have begun and how many have been answered.
    pub fn answered(&self) -> String {
        let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        format!("answered {} of {} reads", count(&self.reads.answered), count(&self.reads.begun))
    }

    /// Returns the path of the disk.
    pub fn file(&self) -> &Path {
        &self.file
    }
}

/// Returns the word at `offset`, which is in bytes: the offset times an odd number, as `tools/guest/src/disk.rs` has it. No
/// two words are equal.
fn word(offset: u64) -> u64 {
    offset.wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

/// A directory with one file.
struct Files {
    bytes: u64,
    delay: Duration,
    reads: Arc<Reads>,
}

/// How many reads there were.
#[derive(Debug, Default)]
struct Reads {
    begun: AtomicU64,
    answered: AtomicU64,
}

impl Files {
    fn attributes(&self, inode: INodeNo) -> Option<FileAttr> {
        let (kind, perm, size) = match inode {
            INodeNo::ROOT => (FileType::Directory, 0o755, 0),
            DISK => (FileType::RegularFile, 0o444, self.bytes),
            _ => return None,
        };
        let time = SystemTime::UNIX_EPOCH;
        Some(FileAttr {
            ino: inode,
            size,
            blocks: size / 512,
            atime: time,
            mtime: time,
            ctime: time,
            crtime: time,
            kind,
            perm,
            nlink: 1,
            uid: 0,
            gid: 0,
            rdev: 0,
            blksize: 4096,
            flags: 0,
        })
    }
}

impl Filesystem for Files {
    fn lookup(&self, _: &Request, _: INodeNo, name: &OsStr, reply: ReplyEntry) {
        match self.attributes(DISK).filter(|_| name == NAME) {
            Some(attributes) => reply.entry(&REMEMBERED, &attributes, Generation(0)),
            None => reply.error(Errno::ENOENT),
        }
    }

    fn getattr(&self, _: &Request, inode: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        match self.attributes(inode) {
            Some(attributes) => reply.attr(&REMEMBERED, &attributes),
            None => reply.error(Errno::ENOENT),
        }
    }

    fn open(&self, _: &Request, _: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        reply.opened(FileHandle(0), FopenFlags::FOPEN_DIRECT_IO);
    }

    fn read(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let reads = self.reads.clone();
        reads.begun.fetch_add(1, Ordering::Relaxed);
        let (delay, end) = (self.delay, offset.saturating_add(size.into()).min(self.bytes));
        // Many reads are under way at once.
        std::thread::spawn(move || {
            std::thread::sleep(delay);
            let first = offset / 8 * 8;
            let words = (first..end).step_by(8).flat_map(|place| word(place).to_le_bytes());
            let bytes: Vec<u8> = words.skip((offset - first) as usize).collect();
            reply.data(&bytes[..end.saturating_sub(offset) as usize]);
            reads.answered.fetch_add(1, Ordering::Relaxed);
        });
    }
}
