//! [`ExternalTracker`] with writes that wait, and a thread that releases them.

use std::thread::JoinHandle;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec};

use super::external::{LAYOUT, Mirror, converge, file_ram, track};
use super::vmm_process::{Act, VmmProcess};
use super::*;
use crate::dirty::ExternalTracker;
use crate::userfault::{Fault, Userfault};
use crate::vmm_mapping::VmmMapping;

/// Releases the writes that wait, until it is dropped; writes that wait later are not released.
struct WriteReleaser {
    stop: Arc<AtomicBool>,
    /// The number of pages, of the region's own size, that were released.
    released: Arc<AtomicU64>,
    thread: Option<JoinHandle<()>>,
}

impl WriteReleaser {
    fn start(memory: Arc<VmmMapping>, userfault: Arc<Userfault>) -> Self {
        let (stop, released) = (Arc::<AtomicBool>::default(), Arc::<AtomicU64>::default());
        let (stopped, count) = (stop.clone(), released.clone());
        let thread = std::thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                for fault in faults(&userfault, Duration::from_millis(5)) {
                    assert!(fault.write && fault.protected);
                    count.fetch_add(1, Ordering::Relaxed);
                    release(&memory, &userfault, fault);
                }
            }
        });
        Self { stop, released, thread: Some(thread) }
    }

    fn released(&self) -> u64 {
        self.released.load(Ordering::Relaxed)
    }
}

impl Drop for WriteReleaser {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.take().unwrap().join().unwrap();
    }
}

/// Returns the faults that are reported within `patience`.
fn faults(userfault: &Userfault, patience: Duration) -> Vec<Fault> {
    let mut ready = [PollFd::new(userfault, PollFlags::IN)];
    let patience = Timespec::try_from(patience).unwrap();
    rustix::io::retry_on_intr(|| rustix::event::poll(&mut ready, Some(&patience))).unwrap();
    let mut found = Vec::new();
    userfault.read(|fault| found.push(fault)).unwrap();
    found
}

fn release(memory: &VmmMapping, userfault: &Userfault, fault: Fault) {
    let page = memory.page_at(fault.address).unwrap();
    for (addresses, _) in memory.pieces(memory.whole(page..page + 1)) {
        userfault.write_protect(addresses, false).unwrap();
    }
}

/// Starts another process over `ram`, whose writes wait.
fn hold(
    name: &str,
    ram: &Arc<GuestRam>,
) -> Option<(VmmProcess, ExternalTracker, Arc<VmmMapping>, Arc<Userfault>)> {
    if let Err(error) = crate::userfault::open() {
        skipped(name, error);
        return None;
    }
    let other = VmmProcess::start(ram);
    let (tracker, memory, userfault) = other.hold(ram);
    Some((other, tracker, memory, userfault))
}

#[test]
fn writes_wait_and_are_reported_once_they_are_released() {
    let ram = file_ram(&LAYOUT);
    let Some((other, mut tracker, memory, userfault)) = hold("holding writes up", &ram) else { return };
    let releaser = WriteReleaser::start(memory, userfault);
    let mut mirror = Mirror::new(&ram, true);
    other.act(Act::Write(7), 3..10);
    other.act(Act::Write(7), 600..1200);
    // Nothing is protected yet.
    assert_eq!(releaser.released(), 0);
    mirror.write_protect(&mut tracker, 0..ram.pages());
    let mut expect = |released: u64, runs: &[(u64, u64)], holes| {
        assert_eq!(releaser.released(), released);
        let expected: Vec<u64> = runs.iter().flat_map(|&(first, end)| first..end).collect();
        let new = expected.len() as u64;
        assert_eq!(mirror.round(&mut tracker), (expected, Harvest { new, holes }));
    };
    expect(0, &[], false);
    // Readers do not wait, and a writer once for each page.
    other.act(Act::Read, 600..1200);
    expect(0, &[], false);
    other.act(Act::Write(8), 4..5);
    other.act(Act::Write(9), 4..5);
    other.act(Act::Write(8), 700..710);
    expect(11, &[(4, 5), (700, 710)], false);
    other.act(Act::Write(9), 4..5);
    expect(12, &[(4, 5)], false);
    // The first write to a hole does not wait, the next one does.
    other.act(Act::Write(8), 256..258);
    expect(12, &[(256, 258)], false);
    other.act(Act::Write(9), 256..258);
    expect(14, &[(256, 258)], false);
    // Emptied while protected, and while written.
    other.act(Act::Punch, 5..6);
    other.act(Act::Write(9), 800..801);
    other.act(Act::Remove, 800..802);
    expect(15, &[(5, 6), (800, 802)], true);
    // The kernel keeps the protection of what was emptied.
    other.act(Act::Write(1), 5..6);
    expect(16, &[(5, 6)], false);
    // Dropped from the page table: known to be protected still.
    other.act(Act::Drop, 900..910);
    other.act(Act::Write(2), 905..906);
    expect(17, &[(905, 906)], false);
    expect(17, &[], false);
    mirror.assert_equal("at last");
}

#[test]
fn loses_no_page_while_writers_wait_and_are_released() {
    for (backing, sparse) in [
        (Backing::File("/dev/shm".into()), true),
        (Backing::Memfd, true),
        (Backing::File("/dev/shm".into()), false),
    ] {
        let ram = Arc::new(GuestRam::create(&LAYOUT, &backing).unwrap());
        let Some((other, mut tracker, memory, userfault)) = hold("a riot held up", &ram) else { return };
        let releaser = WriteReleaser::start(memory, userfault);
        converge(&other, Act::Riot, &mut tracker, &ram, sparse);
        assert!(releaser.released() > 0);
        // And back again.
        drop((releaser, tracker));
        converge(&other, Act::Riot, &mut other.track(&ram).unwrap(), &ram, sparse);
    }
}

#[test]
fn loses_no_huge_page_while_writers_wait_and_are_released() {
    let name = "a riot held up, 2 MiB pages";
    let Some((_pages, ram)) = huge_ram(name) else { return };
    let Some((other, mut tracker, memory, userfault)) = hold(name, &ram) else { return };
    let releaser = WriteReleaser::start(memory, userfault);
    converge(&other, Act::WriteRiot, &mut tracker, &ram, true);
    assert!(releaser.released() > 0);
}

/// One tracker after another, as a guest is stunned.
#[test]
fn loses_no_page_when_one_tracker_follows_another() {
    for (backing, sparse) in [(Backing::File("/dev/shm".into()), true), (Backing::Memfd, false)] {
        let ram = Arc::new(GuestRam::create(&LAYOUT, &backing).unwrap());
        let Some((other, mut first)) = track("one tracker after another", &ram) else { return };
        let mut mirror = Mirror::new(&ram, sparse);
        for page in (0..ram.pages()).step_by(3) {
            other.act(Act::Write(page + 1), page..page + 1);
        }
        mirror.write_protect(&mut first, 0..ram.pages());
        other.act(Act::Riot, 0..0);
        mirror.round(&mut first);
        other.act(Act::Halt, 0..0);
        mirror.round(&mut first);
        first.stop();
        let (mut tracker, memory, userfault) = other.hold(&ram);
        let releaser = WriteReleaser::start(memory, userfault);
        tracker.write_protect_all().unwrap();
        other.act(Act::Riot, 0..0);
        for _ in 0..10 {
            mirror.round(&mut tracker);
        }
        other.act(Act::Halt, 0..0);
        mirror.round(&mut tracker);
        mirror.assert_equal("from one tracker to another");
        // A page that was there, and one that was not.
        let released = releaser.released();
        other.act(Act::Write(1), 300..301);
        other.act(Act::Write(1), 301..302);
        assert_eq!(releaser.released(), released + 2);
        drop(releaser);
    }
}

/// A write that waits when tracking ends goes on, and so does a later write.
#[test]
fn all_go_on_when_tracking_ends() {
    let ram = file_ram(&LAYOUT);
    for stops in [true, false] {
        let Some((other, mut tracker, memory, userfault)) = hold("ending a hold", &ram) else { return };
        other.act(Act::Write(1), 0..100);
        tracker.write_protect(0..ram.pages()).unwrap();
        std::thread::scope(|scope| {
            let writer = scope.spawn(|| other.act(Act::Write(2), 0..100));
            let first = loop {
                if let Some(fault) = faults(&userfault, Duration::from_secs(1)).first() {
                    break *fault;
                }
            };
            assert_eq!(memory.page_at(first.address), Some(0));
            assert!(!writer.is_finished());
            // With and without others who have the descriptor.
            if stops {
                tracker.stop();
            } else {
                drop((tracker, userfault));
            }
            writer.join().unwrap();
        });
    }
}
