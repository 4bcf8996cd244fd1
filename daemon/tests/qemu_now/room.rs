//! Whether there is room for the guest is found out before it moves.

use std::fs;
use std::path::{Path, PathBuf};

use memlane_lab::HostId;
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

use crate::common::qemu::{Qemu, assert_moves, assert_says_no, stage};
use crate::scene::fill;

/// A tmpfs of a few MiB.
struct Small(PathBuf);

impl Small {
    fn mount(directory: &Path) -> Self {
        fs::create_dir(directory).unwrap();
        mount("tmpfs", directory, "tmpfs", MountFlags::empty(), c"size=70m").unwrap();
        Self(directory.to_owned())
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
    let small = Small::mount(&b.directory().join("small"));
    let other = small.0.join("other");
    fs::write(&other, vec![1; 60 << 20]).unwrap();
    let ram = format!(
        "-m 64M -object memory-backend-file,id=memlane-ram,share=on,size=64M,mem-path={} -machine memory-backend=memlane-ram",
        small.0.display()
    );
    let there = Qemu::start_with_ram(b, "web1", &format!("{ram} -incoming defer"));
    for (id, qemu, more) in [(HostId::A, &here, &[][..]), (HostId::B, &there, &["--incoming"])] {
        let answer = qemu.attach(&stage, id, "web1", more);
        assert_eq!(answer.code, 0, "{}", answer.text);
    }
    for command in ["check", "migrate"] {
        let answer = stage.rig.ctl(HostId::A, &[command, "web1", "host-b"]).unwrap();
        assert_says_no(&answer, &["the file system of its memory has", "remount,size="]);
    }
    fs::remove_file(other).unwrap();
    assert_moves(&stage);
}
