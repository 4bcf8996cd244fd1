//! `memlane-qemu`, which takes no arguments of its own, as a command of which a page can be made.

use clap::{Arg, Command};

/// Returns the command.
pub(crate) fn command() -> Command {
    Command::new("memlane-qemu")
        .about("Stands in front of QEMU where a manager of guests starts it, so that Memlane can move its guests")
        .long_about(
            "memlane-qemu takes the command line of QEMU, adds what Memlane needs to move the guest (RAM in shared files, \
             the shim, and a monitor), and becomes that QEMU. libvirt names it as <emulator>; elsewhere it is linked in the \
             place of QEMU's own program. Whatever it cannot do, the guest starts, and a line on standard error says what \
             keeps it from being moved.",
        )
        .after_help(
            "All arguments are QEMU's, so the settings are environment variables:\n\n\
             MEMLANE_EMULATOR: the QEMU to start. Without it that is the program in whose place memlane-qemu stands (its \
             name with .distrib behind it), or else the QEMU of the host.\n\n\
             MEMLANE_SHIM: the shim; /usr/lib/memlane/libmemlane_shim.so without it.\n\n\
             MEMLANE_ATTACH_SOCKET: where the shim finds the daemon; /run/memlane/attach.sock without it.\n\n\
             MEMLANE_RAM: the directory of ordinary RAM, a tmpfs or a hugetlbfs; /dev/shm without it.\n\n\
             MEMLANE_MONITORS: the directory of the monitors' sockets; /run/memlane-qemu without it.\n\n\
             MEMLANE_QEMU_SHOW=1: shows what it would start, and starts nothing.",
        )
        .disable_help_flag(true)
        .disable_version_flag(true)
        .arg(
            Arg::new("QEMU_ARGUMENTS")
                .num_args(0..)
                .help("The arguments of QEMU, which qemu-system-x86_64(1) describes"),
        )
}
