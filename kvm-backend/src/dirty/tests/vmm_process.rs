//! A process that stands for a VMM: it maps a guest's memory and uses it as the test says.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};

use memlane_protocol::wire::machine::Region;
use rustix::mm::Advice;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

use super::*;
use crate::dirty::external::WriteProtection;
use crate::packet;
use crate::userfault::{self, Userfault, WRITE_PROTECT, WRITE_PROTECT_ASYNC};
use crate::vmm_mapping::VmmMapping;

/// The variable that makes the test binary the other process.
const MARK: &str = "MEMLANE_TEST_VMM_PROCESS";

/// What the other process does with pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Act {
    /// Writes a number to the first word of each.
    Write(u64),
    /// Reads them.
    Read,
    /// Makes a hole in the file.
    Punch,
    /// Makes a hole by `MADV_REMOVE`.
    Remove,
    /// Drops them from the page table, and nothing else.
    Drop,
    /// Has the kernel write them to swap, or at least drop them.
    PageOut,
    /// Does all of that at once and at random, in threads, until `Halt`.
    Riot,
    /// Does the same as `Riot`, but takes no memory away.
    WriteRiot,
    /// Ends a riot.
    Halt,
    /// Maps them no longer.
    Unmap,
}

/// A tracker, and what it works on.
pub(super) type Tracked = (ExternalTracker, Arc<VmmMapping>, Arc<Userfault>);

/// The other process, as the test sees it. It is killed when this value is dropped.
pub(super) struct VmmProcess {
    child: Child,
    socket: OwnedFd,
}

impl VmmProcess {
    pub(super) fn start(ram: &GuestRam) -> Self {
        let flags = SocketFlags::CLOEXEC;
        let (socket, theirs) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "dirty::tests::vmm_process::the_vmm_process", "--nocapture"])
            .env(MARK, "1")
            .stdin(Stdio::from(theirs))
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let shape = ram.regions().iter().flat_map(|r| [r.address, r.bytes, r.page_bytes.into(), r.offset]);
        packet::send(&socket, &bytes(shape), &ram.descriptors()).unwrap();
        Self { child, socket }
    }

    /// Tracks it, by descriptors that it makes for this.
    pub(super) fn track(&self, ram: &Arc<GuestRam>) -> Result<ExternalTracker, TrackError> {
        self.track_with(ram, WRITE_PROTECT_ASYNC, WriteProtection::Async).map(|(tracker, ..)| tracker)
    }

    /// Tracks it with writes held up, until they are released by the userfaultfd.
    pub(super) fn hold(&self, ram: &Arc<GuestRam>) -> Tracked {
        self.track_with(ram, WRITE_PROTECT, WriteProtection::Sync).unwrap()
    }

    fn track_with(
        &self,
        ram: &Arc<GuestRam>,
        features: u64,
        writes: WriteProtection,
    ) -> Result<Tracked, TrackError> {
        packet::send(&self.socket, &[0], &[]).unwrap();
        let mut buffer = [0; 1024];
        let (length, descriptors) = packet::recv(&self.socket, &mut buffer).unwrap();
        let [userfault, pagemap] = <[OwnedFd; 2]>::try_from(descriptors).unwrap();
        let userfault = Arc::new(Userfault::from_fd(userfault, features).unwrap());
        let memory = VmmMapping::new(Arc::clone(ram), &numbers(&buffer[..length])).unwrap();
        let memory = Arc::new(memory);
        let tracker = ExternalTracker::new(memory.clone(), userfault.clone(), File::from(pagemap), writes)?;
        Ok((tracker, memory, userfault))
    }

    /// Has it act, and waits until it has.
    pub(super) fn act(&self, act: Act, pages: Range<u64>) {
        let (code, value) = match act {
            Act::Write(value) => (1, value),
            Act::Read => (2, 0),
            Act::Punch => (3, 0),
            Act::Remove => (4, 0),
            Act::Drop => (5, 0),
            Act::PageOut => (6, 0),
            Act::Riot => (7, 0),
            Act::WriteRiot => (7, 1),
            Act::Halt => (8, 0),
            Act::Unmap => (9, 0),
        };
        packet::send(&self.socket, &bytes([code, pages.start, pages.end, value]), &[]).unwrap();
        assert_eq!(packet::recv(&self.socket, &mut [0; 8]).unwrap().0, 1, "the other process has ended");
    }

    /// Bytes of its page tables.
    pub(super) fn page_table_bytes(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmPTE:")).unwrap();
        line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() << 10
    }

    pub(super) fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for VmmProcess {
    fn drop(&mut self) {
        // It may have been killed by the test.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// No test, but what [`VmmProcess::start`] runs.
#[test]
fn the_vmm_process() {
    if std::env::var_os(MARK).is_none() {
        return;
    }
    let stdin = std::io::stdin();
    let socket = stdin.as_fd();
    let mut buffer = [0; 4096];
    let (length, descriptors) = packet::recv(socket, &mut buffer).unwrap();
    let shape = numbers(&buffer[..length]);
    let regions =
        shape.chunks(4).map(|r| Region { address: r[0], bytes: r[1], page_bytes: r[2] as u32, offset: r[3] });
    let ram = Arc::new(GuestRam::map(regions.zip(descriptors).collect()).unwrap());
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        loop {
            match packet::recv(socket, &mut buffer) {
                Ok((1, _)) => hand_over(socket, &ram),
                Ok((32, _)) => {
                    let order = numbers(&buffer[..32]);
                    let pages = order[1]..order[2];
                    match order[0] {
                        7 => {
                            stop.store(false, Ordering::SeqCst);
                            let acts = if order[3] == 0 { &RIOT[..] } else { &RIOT[..WRITES] };
                            for seed in 1..4 {
                                scope.spawn({
                                    let (ram, stop) = (&ram, &stop);
                                    move || riot(ram, stop, seed, acts)
                                });
                            }
                        }
                        8 => stop.store(true, Ordering::SeqCst),
                        code => act(&ram, code, pages, order[3]),
                    }
                    while order[0] == 8 && Arc::strong_count(&ram) > 1 {
                        std::thread::yield_now();
                    }
                    packet::send(socket, &[1], &[]).unwrap();
                }
                _ => std::process::exit(0),
            }
        }
    });
}

fn hand_over(socket: BorrowedFd<'_>, ram: &GuestRam) {
    let userfault = userfault::open().unwrap();
    let pagemap = File::open("/proc/self/pagemap").unwrap();
    let mut first = 0;
    let addresses = ram.regions().iter().map(|region| {
        let slice = ram.slices(first..first + 1).next().unwrap();
        first += region.bytes / PAGE_SIZE;
        slice.ptr as u64
    });
    packet::send(socket, &bytes(addresses), &[userfault.as_fd(), pagemap.as_fd()]).unwrap();
}

fn act(ram: &GuestRam, code: u64, pages: Range<u64>, value: u64) {
    if code == 3 {
        return ram.punch(pages).unwrap();
    }
    for slice in ram.slices(pages) {
        let advise = |advice| {
            // SAFETY: this is memory of a shared file, into which there are no references.
            unsafe { rustix::mm::madvise(slice.ptr.cast(), slice.len, advice) }.unwrap();
        };
        match code {
            4 => advise(Advice::LinuxRemove),
            5 => advise(Advice::LinuxDontNeed),
            6 => advise(Advice::LinuxPageOut),
            // SAFETY: as above, and nothing here touches it again.
            9 => unsafe { rustix::mm::munmap(slice.ptr.cast(), slice.len) }.unwrap(),
            _ => {
                for offset in (0..slice.len).step_by(PAGE_SIZE as usize) {
                    let word = slice.ptr.wrapping_add(offset).cast::<u64>();
                    // SAFETY: within the slice; atomics allow other writers.
                    let word = unsafe { AtomicU64::from_ptr(word) };
                    match code {
                        1 => word.store(value, Ordering::Relaxed),
                        _ => drop(word.load(Ordering::Relaxed)),
                    }
                }
            }
        }
    }
}

/// What a riot does: mostly writes, and reads, and sometimes takes away what it wrote.
const RIOT: [u64; 12] = [1, 1, 1, 1, 1, 1, 2, 2, 2, 3, 4, 5];
/// So many of these take nothing away.
const WRITES: usize = 9;

/// Does what `acts` says, at random.
fn riot(ram: &Arc<GuestRam>, stop: &AtomicBool, seed: u64, acts: &[u64]) {
    let ram = Arc::clone(ram);
    let mut random = Random(seed);
    while !stop.load(Ordering::Relaxed) {
        let first = random.below(ram.pages());
        let code = acts[random.below(acts.len() as u64) as usize];
        let most = if code == 5 && random.below(8) == 0 { 1500 } else { 12 };
        let end = (first + 1 + random.below(most)).min(ram.pages());
        act(&ram, code, first..end, random.next() | 1);
    }
}

fn bytes(numbers: impl IntoIterator<Item = u64>) -> Vec<u8> {
    numbers.into_iter().flat_map(u64::to_le_bytes).collect()
}

fn numbers(bytes: &[u8]) -> Vec<u64> {
    bytes.chunks_exact(8).map(|word| u64::from_le_bytes(word.try_into().unwrap())).collect()
}

/// Numbers that are the same each time.
pub(super) struct Random(pub(super) u64);

impl Random {
    pub(super) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        self.0 >> 16
    }

    pub(super) fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }
}
