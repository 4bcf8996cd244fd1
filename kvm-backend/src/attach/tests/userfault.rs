//! The guest's userfaultfd, which outlives a connection and not the guest.

use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use memlane_protocol::PAGE_SIZE;
use memlane_protocol::wire::attach::{Request, RunState};

use super::*;
use crate::userfault::{Faults, MISSING, Userfault};

/// A thread of the VMM waits for a page that never comes, with the VMM's lock held: it is let go.
#[test]
fn a_discarded_guest_keeps_no_thread_waiting_for_its_memory() {
    let mut bench = Bench::new(RunState::Incoming);
    let (daemon, _) = bench.welcome();
    let (reply, descriptors) = daemon.ask_with(Request::OpenUserfault { keep: true }, &[]);
    if let Err(reason) = reply {
        return memlane_lab::say_skipped("a discarded guest's memory", &reason);
    }
    let userfault = Userfault::from_fd(descriptors.into_iter().next().unwrap(), MISSING).unwrap();
    let page = bench.vmm.lock().unwrap().ram.slices(0..1).next().unwrap().ptr as u64;
    userfault.register(page..page + PAGE_SIZE, Faults::Missing).unwrap();
    daemon.ask_with(Request::Load { bytes: 1 }, &[memfd(b"x").as_fd()]).0.unwrap();
    let vmm = bench.vmm.clone();
    let waits = std::thread::spawn(move || {
        let vmm = vmm.lock().unwrap();
        // SAFETY: the page is mapped as long as the VMM has the RAM.
        unsafe { vmm.ram.slices(0..1).next().unwrap().ptr.read_volatile() }
    });
    wait_for(userfault.as_fd());
    drop(userfault);
    daemon.ask(Request::Discard).unwrap();
    assert_eq!(waits.join().unwrap(), 0);
    assert!(matches!(bench.ended(), Ended::Discarded));
    assert!(bench.vmm.lock().unwrap().discarded);
}

/// A thread that waits for a missing page of a guest waits on without a daemon, if the daemon asked for that.
#[test]
fn a_userfaultfd_is_handed_over_and_kept() {
    let test = "handing a userfaultfd over";
    for run_state in [RunState::Running, RunState::Incoming] {
        let bench = Bench::new(run_state);
        let (daemon, _) = bench.welcome();
        let (reply, descriptors) = daemon.ask_with(Request::OpenUserfault { keep: true }, &[]);
        if let Err(reason) = reply {
            return memlane_lab::say_skipped(test, &reason);
        }
        let [userfault, _pagemap, maps] = <[OwnedFd; 3]>::try_from(descriptors).unwrap();
        let mut text = String::new();
        File::from(maps).read_to_string(&mut text).unwrap();
        assert!(text.contains("-"), "{text}");
        let userfault = Userfault::from_fd(userfault, MISSING).unwrap();
        let ram = bench.vmm.lock().unwrap().ram.clone();
        let page = ram.slices(0..1).next().unwrap().ptr as u64;
        userfault.register(page..page + PAGE_SIZE, Faults::Missing).unwrap();
        // SAFETY: mapped as long as `ram` lives, which the thread holds.
        let read = move || unsafe { ram.slices(0..1).next().unwrap().ptr.read_volatile() };
        let reader = std::thread::spawn(read);
        wait_for(userfault.as_fd());
        assert_eq!(userfault.read(|_| {}).unwrap(), 1);
        drop((userfault, daemon));
        let (daemon, _) = bench.welcome();
        if run_state == RunState::Running {
            std::thread::sleep(Duration::from_millis(5));
            assert!(!reader.is_finished());
            let (reply, mut descriptors) = daemon.ask_with(Request::KeptUserfault, &[]);
            assert_eq!((reply, descriptors.len()), (Ok([0; 2]), 3));
            let userfault = Userfault::from_fd_set_up(descriptors.swap_remove(0)).unwrap();
            // The access was reported to the daemon before, and is reported once more.
            userfault.wake(page..page + PAGE_SIZE).unwrap();
            wait_for(userfault.as_fd());
            assert!(!reader.is_finished());
            let (reply, descriptors) = daemon.ask_with(Request::OpenUserfault { keep: false }, &[]);
            assert_eq!((reply, descriptors.len()), (Ok([0; 2]), 3));
            drop(userfault);
        } else {
            let (reply, _) = daemon.ask_with(Request::KeptUserfault, &[]);
            assert_eq!(reply, Err("no userfaultfd is kept".to_owned()));
        }
        assert_eq!(reader.join().unwrap(), 0);
    }
}
