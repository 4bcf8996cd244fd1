//! Files that people write.

use super::{Seeds, named};

pub(super) fn guest_file() -> Seeds {
    let whole = r#"name = "web1"
memory = "64MiB"
prealloc = true
qemu = "/opt/qemu/bin/qemu-system-x86_64"
arguments = ["-machine", "q35,accel=kvm", "-smp", "2", "-vnc", ":1", "-append", ""]

[[nic]]
mac = "52:54:00:4d:4c:01"
tap = "tap-web1,x=y"
network = "lan"
[[nic]]
mac = "52:54:00:4d:4c:02"
tap = "tap-web1b"
network = "storage"
vhost = true
"#;
    let inline = r#"name="a.b-c_D"
memory='1.5GiB'
arguments=["""-device""", 'virtio-rng-pci', "\u0041",]
nic=[{mac="02:00:00:00:00:01",tap="t0",network="n"}]
"#;
    named([
        ("least", "name = \"web1\"\nmemory = \"2GiB\"\n"),
        ("whole", whole),
        ("inline", inline),
        ("unknown-key", "name = \"web1\"\nmemory = \"2GiB\"\n\"mem\\u001bory\" = 1\n"),
        ("wrong-value", "# a guest\nname = \"web1\"\nmemory = 2_147_483_648\n"),
        (
            "clash",
            "name = \"web1\"\nmemory = \"2GiB\"\narguments = [\"-machine\", \"q35,memory-backend=x\"]\n",
        ),
        (
            "twice",
            "name = \"web1\"\nmemory = \"2GiB\"\nnic = [{mac=\"02:00:00:00:00:01\",tap=\"t\",network=\"n\"},\n{mac=\"02:00:00:00:00:01\",tap=\"u\",network=\"n\"}]\n",
        ),
        ("syntax", "name = \"web1\nmemory = \"2GiB\"\n"),
    ])
}

pub(super) fn config() -> Seeds {
    let whole = r#"insecure = false
host = "host-a"
api_socket = "/run/memlane/api.sock"
attach_socket = "/run/memlane/attach.sock"
attach_users = ["root", 990]
journal = "/var/lib/memlane"
metrics = "127.0.0.1:9410"
control = "192.0.2.11"
lane_port = 7411

[keys]
certificate = "/etc/memlane/keys/host.pem"
key = "/etc/memlane/keys/host.key"
ca = "/etc/memlane/keys/ca.pem"

[[port]]
name = "a"
address = "192.0.2.11"
interface = "eth1"
speed = "10gbit"
lanes = 2
congestion_control = "cubic"
[[port]]
name = "b"
address = "2001:db8::11"

[[peer]]
name = "host-b"
control = "192.0.2.12:7410"
may_start_guests = true
[[peer]]
name = "far"
control = "[2001:db8:1::1]"
ca = "/etc/memlane/keys/far.pem"

[[network]]
name = "lan"
bridge = "br0"

[attach]
guests_per_user = 10
descriptors_per_user = 1_000
memory_per_user = "1TiB"

[limits]
downtime = "300ms"
min_bandwidth = "250mbit"
max_rounds = 30
converge = "auto"
max_stun = 80
compression = "off"
silence = "1.5s"
memory_reserve = "512MiB"

[guests]
directory = "/run/memlane/guests"
memory = "/dev/shm"
shim = "/usr/lib/libmemlane_shim.so"
qemu = ["/usr/bin/qemu-system-x86_64"]
"#;
    named([
        ("whole", whole),
        ("nothing", "host = \"host-a\"\n"),
        ("insecure", "insecure = true\nhost = 'host-a'\ncontrol = \"[::]:7410\"\n"),
        ("unknown-key", "host = \"host-a\"\n[limits]\ndowntimes = \"1s\"\n"),
        ("out-of-range", "host = \"host-a\"\n[limits]\ndowntime = \"2min\"\n"),
        (
            "twice",
            "host = \"h\"\nport = [{name=\"a\",address=\"192.0.2.1\"},\n{name=\"b\",address=\"192.0.2.1\"}]\n",
        ),
        ("own-peer", "host = \"h\"\n[[peer]]\nname = \"h\"\ncontrol = \"192.0.2.1\"\n"),
        ("syntax", "host = \"host-a\"\n[limits\n"),
    ])
}
