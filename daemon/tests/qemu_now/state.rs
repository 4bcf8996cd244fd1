//! The state of a QEMU with much video memory is sent before the guest is paused.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;

use memlane_lab::{HostId, Rate};

use crate::common::qemu::Qemu;
use crate::scene::Scene;

const VIDEO_BYTES: u64 = 64 << 20;
/// There is no ROM, whose program would draw.
const VIDEO: &str = "-device VGA,vgamem_mb=64,romfile=";

/// The video memory of a QEMU, as its process has it.
struct Video {
    memory: File,
    address: u64,
}

impl Video {
    fn of(qemu: &Qemu) -> Self {
        let maps = fs::read_to_string(format!("/proc/{}/maps", qemu.pid())).unwrap();
        // Without a file, and of just this size, or with what comes next to it.
        let found = maps.lines().find_map(|line| {
            let mut words = line.split_whitespace();
            let (range, rights, inode) = (words.next()?, words.next()?, words.nth(2)?);
            let (first, end) = range.split_once('-')?;
            let (first, end) = (u64::from_str_radix(first, 16).ok()?, u64::from_str_radix(end, 16).ok()?);
            (rights == "rw-p" && inode == "0" && end - first == VIDEO_BYTES).then_some(first)
        });
        let memory = File::options().read(true).write(true).open(format!("/proc/{}/mem", qemu.pid()));
        Self { memory: memory.unwrap(), address: found.expect("QEMU has its video memory in one piece") }
    }

    fn bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0; VIDEO_BYTES as usize];
        self.memory.read_exact_at(&mut bytes, self.address).unwrap();
        bytes
    }
}

/// On this port it takes five seconds, and the pause may take one.
#[test]
fn a_large_state_is_sent_before_the_pause() {
    let test = "a_large_state_is_sent_before_the_pause";
    let rate = Rate::from_bits_per_second(100_000_000);
    let Some(scene) = Scene::new(test, VIDEO, Some(rate)) else { return };
    let mut state = 1u64;
    let mut word = || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        ((state >> 33) as u32).to_le_bytes()
    };
    let drawn: Vec<u8> = (0..VIDEO_BYTES / 4).flat_map(|_| word()).collect();
    let here = Video::of(&scene.here);
    here.memory.write_all_at(&drawn, here.address).unwrap();

    let check = scene.stage.rig.ctl(HostId::A, &["check", "web1", "host-b", "--json"]).unwrap();
    let state_bytes = check.last().unwrap()["estimate"]["state_bytes"].as_u64().unwrap();
    assert!((VIDEO_BYTES..2 * VIDEO_BYTES).contains(&state_bytes), "{}", check.text);

    let answer = scene.stage.migrate("web1", &["--downtime-limit", "1s", "--compression", "off"]);
    assert_eq!(answer.code, 0, "{}", answer.text);
    let moved = answer.last().unwrap();
    assert!(moved["vmm_state_bytes"].as_u64().unwrap() > VIDEO_BYTES, "{moved}");
    scene.there.assert_runs();
    assert!(Video::of(&scene.there).bytes() == drawn, "something else is shown");
}
