//! Whether there is room for the guest is found out before it moves.

use std::ffi::CStr;
use std::fs;
use std::path::{Path, PathBuf};

use memlane_lab::{HostId, HugePages, say_skipped};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

use crate::common::qemu::{Qemu, assert_moves, assert_says_no, attach_both, guest_file, stage};
use crate::scene::fill;

/// A file system of memory that is full with a few MiB.
struct Small(PathBuf);

impl Small {
    fn mount(directory: &Path, kind: &str, options: &CStr) -> Self {
        fs::create_dir(directory).unwrap();
        mount(kind, directory, kind, MountFlags::empty(), options).unwrap();
        Self(directory.to_owned())
    }

    /// The arguments for RAM in a file without a name there.
    fn ram(&self, more: &str) -> String {
        format!(
            "-m 64M -object memory-backend-file,id=memlane-ram,share=on,size=64M,mem-path={}{more} \
             -machine memory-backend=memlane-ram",
            self.0.display()
        )
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = unmount(&self.0, UnmountFlags::DETACH);
    }
}

/// The file system of the waiting QEMU's memory has room for what that holds now, and not for the guest.
#[test]
fn a_file_system_that_is_full_refuses_the_guest() {
    let Some(stage) = stage("a_file_system_that_is_full_refuses_the_guest", false, "") else { return };
    let [a, b] = stage.rig.lab().hosts();
    let here = Qemu::start(a, "web1", "");
    fill(a);
    let small = Small::mount(&b.directory().join("small"), "tmpfs", c"size=70m");
    let other = small.0.join("other");
    fs::write(&other, vec![1; 60 << 20]).unwrap();
    let there = Qemu::start_with_ram(b, "web1", &(small.ram("") + " -incoming defer"));
    attach_both(&stage, &here, &there);
    for command in ["check", "migrate"] {
        let answer = stage.rig.ctl(HostId::A, &[command, "web1", "host-b"]).unwrap();
        assert_says_no(&answer, &["the file system of its memory has", "remount,size="]);
    }
    fs::remove_file(other).unwrap();
    assert_moves(&stage);
}

/// QEMU has reserved none of its huge pages, and there are not enough of them: the daemon reserves them when it takes QEMU.
#[test]
fn huge_pages_that_are_not_there_refuse_the_guest() {
    let test = "huge_pages_that_are_not_there_refuse_the_guest";
    let _pages = match HugePages::reserve(32) {
        Ok(pages) => pages,
        Err(error) => return say_skipped(test, &format!("{error:#}")),
    };
    let Some(stage) = stage(test, false, "") else { return };
    let [_, b] = stage.rig.lab().hosts();
    let small = Small::mount(&b.directory().join("small"), "hugetlbfs", c"pagesize=2M,size=16M");
    let waiting = Qemu::start_with_ram(b, "web1", &(small.ram(",reserve=off") + " -incoming defer"));
    let answer = waiting.attach(&stage, HostId::B, "web1", &["--incoming"]);
    assert_says_no(&answer, &["takes 32 huge pages of 2048 KiB", "nr_hugepages"]);
}

/// What QEMU says when it cannot start is told with what helps.
#[test]
fn a_qemu_that_may_not_lock_its_memory_is_not_launched() {
    let Some(mut stage) = stage("a_qemu_that_may_not_lock_its_memory_is_not_launched", false, "") else {
        return;
    };
    stage.rig.start_daemon_after(HostId::A, "ulimit -l 64").unwrap();
    let file = guest_file(stage.rig.lab().host(HostId::A), "web1", "-overcommit mem-lock=on", "");
    let answer = stage.rig.ctl(HostId::A, &["launch", &file]).unwrap();
    assert_says_no(&answer, &["locking memory failed", "LimitMEMLOCK="]);
}
