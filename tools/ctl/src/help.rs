//! What `--help` says besides the options.

pub(crate) const EXAMPLES: &str = "\
Examples:
  memlanectl doctor                              what is missing on this host, and what mends it
  memlanectl setup --peer host-b=192.0.2.12      a first configuration; --write puts it in its place
  memlanectl guests                              which guests are attached here
  memlanectl check web1 host-b                   would it move, and how fast? (moves nothing)
  memlanectl migrate web1 host-b                 move it and watch
  memlanectl migrate web1 host-b --downtime-limit 50ms --verify
  memlanectl migrate web1 host-b --converge auto  a guest that writes faster than the ports carry
  memlanectl --json migrate web1 host-b | jq .downtime_seconds
  memlanectl watch                               watch what is under way
  memlanectl cancel web1                         the guest stays where it runs
  memlanectl abandon web1                        it runs here in post-copy, and the other host is gone for good
  memlanectl resolve web1 --run-here --other-host-is-off   it is in doubt, and the other host is off and stays off
  memlanectl launch web1.toml                    start a QEMU guest; launch --help shows such a file
  memlanectl attach --name web1                  a QEMU that others started, by memlane-qemu
  memlanectl attach --libvirt web1               a domain of libvirt
  memlanectl attach --qmp /run/web1.qmp --name web1

Exit codes:
  0  done; for migrate and watch: the guest runs at the destination
  1  another error
  2  the command line or a value in it is wrong
  3  refused: nothing was begun, or it is too late (cancel)
  4  failed: the guest runs on at its source
  5  cancelled: the guest runs on at its source
  6  no daemon answers, or it went away
  7  lost: the guest was handed over, and its VMM ended, or the rest of its memory will never come
  8  forbidden: you may not do this here, or not use the daemon at all
  9  powered off: the guest shut itself down meanwhile, and runs nowhere
  10  incomplete: doctor found something missing on this host";

pub(crate) const GUEST_FILE: &str = r#"A guest file:
  name = "web1"
  memory = "2GiB"
  prealloc = false                          # true takes all RAM from the host at the start
  qemu = "/usr/bin/qemu-system-x86_64"      # one that guests.qemu of the daemon's configuration allows
  user = 2100000012                         # as whom QEMU runs, one of guests.users: its disks are to be his
  arguments = ["-machine", "q35", "-accel", "kvm", "-smp", "2", "-drive", "file=/srv/web1,if=virtio"]

  [[nic]]                                   # up to 16, or none
  mac = "52:54:00:4d:4c:01"
  tap = "tap-web1"
  network = "lan"                           # a [[network]] of the daemon's configuration
  vhost = false                             # true lets vhost-net carry its packets

prealloc, qemu and vhost may be left out where they are as above; without user the daemon chooses
one that is free. The daemon adds the name, RAM, monitor, sandbox and NICs, so -m, -name, -mem-path,
-machine memory-backend=, -incoming, -daemonize, -runas and -S are refused among the arguments. Paths are paths on the daemon's host. The tap must exist, belong
to the daemon's user and be joined to its bridge:
  ip tuntap add tap-web1 mode tap user memlane
  ip link set tap-web1 master br0 up

A host that the guest moves to starts its QEMU from the same file if may_start_guests of this
host is set in its configuration; otherwise give it the file: memlanectl launch web1.toml --incoming"#;

pub(crate) const ATTACH: &str = "\
A domain of libvirt is attached by --libvirt; if something is missing in its XML, the answer says which lines to add.
Any other QEMU must have been started by memlane-qemu, or with
  all its RAM in files: -object memory-backend-file,id=ram0,share=on,size=2G,mem-path=/dev/shm
                        -machine memory-backend=ram0
  a QMP socket that no other program is connected to: -qmp unix:/run/web1.qmp,server=on,wait=off
  and, in its environment: LD_PRELOAD=/usr/lib/memlane/libmemlane_shim.so
                           MEMLANE_ATTACH_SOCKET=/run/memlane/attach.sock
by a user that attach_users in the daemon's configuration names. If something is missing,
the answer says what. A QEMU that waits (--incoming) needs the arguments of the QEMU that the guest
comes from, ids included.";

pub(crate) const DOCTOR: &str = "\
Each line says what was looked at and what was found; the line below it says what to do:
  ok       it is as it should be
  advice   guests move as it is, and it could be better
  MISSING  guests, or those of one kind, cannot move; the exit code is 10 then

Run it as root: other users may not look at everything. With --json the names in \"check\" stay as they are.";

pub(crate) const SETUP: &str = "\
Examples:
  memlanectl setup                                     show a configuration for this host
  memlanectl setup --peer host-b=192.0.2.12 --write    put it into /etc/memlane/memlaned.toml
  memlanectl setup --port a=eth1 --port b=eth2         lend these interfaces

Without --port, each interface that is up and has an IPv4 address becomes a port, unless it belongs to guests or
containers; the one with the default route becomes one only if there is no other. Ports are named a, b and so on by their
addresses: lanes join ports of one name, so name them alike on all hosts. Findings go to standard error, the
configuration to standard output. A file that is there is never overwritten.";

pub(crate) const KEYS: &str = "\
Examples:
  memlanectl keys init                   once, on a machine that only administrators use
  memlanectl keys issue host-a           for each host; then put the files into /etc/memlane/keys there
  memlanectl keys show                   what this host has, and until when it is valid";
