//! Domains as `virsh dumpxml` of libvirt 9 and 11 prints them.

use super::*;

/// libvirt 9.0, with the lines of docs/qemu.md.
const OF_9: &str = r"<domain type='kvm' id='3' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
  <name>web1</name>
  <uuid>3b1c1a6e-6f0a-4b44-9d1e-6f6a2a0c7b11</uuid>
  <memory unit='KiB'>2097152</memory>
  <currentMemory unit='KiB'>2097152</currentMemory>
  <memoryBacking>
    <source type='file'/>
    <access mode='shared'/>
  </memoryBacking>
  <vcpu placement='static'>2</vcpu>
  <resource>
    <partition>/machine</partition>
  </resource>
  <os>
    <type arch='x86_64' machine='pc-q35-7.2'>hvm</type>
    <boot dev='hd'/>
  </os>
  <cpu mode='custom' match='exact' check='full'>
    <model fallback='forbid'>Skylake-Server-IBRS</model>
  </cpu>
  <devices>
    <emulator>/usr/bin/qemu-system-x86_64</emulator>
    <disk type='file' device='disk'>
      <driver name='qemu' type='qcow2'/>
      <source file='/srv/web1.qcow2' index='1'/>
      <target dev='vda' bus='virtio'/>
      <alias name='virtio-disk0'/>
    </disk>
  </devices>
  <seclabel type='dynamic' model='apparmor' relabel='yes'>
    <label>libvirt-3b1c1a6e-6f0a-4b44-9d1e-6f6a2a0c7b11</label>
  </seclabel>
  <qemu:commandline>
    <qemu:arg value='-qmp'/>
    <qemu:arg value='unix:/run/memlane-libvirt/web1.qmp,server=on,wait=off'/>
    <qemu:env name='LD_PRELOAD' value='/usr/lib/memlane/libmemlane_shim.so'/>
    <qemu:env name='MEMLANE_ATTACH_SOCKET' value='/run/memlane/attach.sock'/>
  </qemu:commandline>
</domain>";

/// libvirt 11.3, started by memlane-qemu.
const OF_11: &str = r"<domain type='kvm' id='1'>
  <name>db-2</name>
  <uuid>9d9df1ab-7c3c-4dd5-8a1f-1b5f3c1f9a02</uuid>
  <metadata>
    <libosinfo:libosinfo xmlns:libosinfo='http://libosinfo.org/xmlns/libvirt/domain/1.0'>
      <libosinfo:os id='http://debian.org/debian/13'/>
    </libosinfo:libosinfo>
  </metadata>
  <memory unit='KiB'>1048576</memory>
  <os firmware='efi'>
    <type arch='x86_64' machine='pc-q35-10.0'>hvm</type>
    <loader readonly='yes' type='pflash' format='raw'>/usr/share/OVMF/OVMF_CODE_4M.fd</loader>
  </os>
  <devices>
    <emulator>/usr/bin/memlane-qemu</emulator>
  </devices>
</domain>";

fn without(xml: &str, part: &str) -> String {
    let lines = xml.lines().filter(|line| !line.contains(part));
    lines.map(|line| format!("{line}\n")).collect()
}

fn refused(xml: &str) -> String {
    read(xml).unwrap_err()
}

#[test]
fn monitors_of_domains_are_found() {
    let domain = |name: &str, monitor: &str| Domain { name: name.into(), monitor: monitor.into() };
    assert_eq!(read(OF_9), Ok(domain("web1", "/run/memlane-libvirt/web1.qmp")));
    assert_eq!(read(OF_11), Ok(domain("db-2", "/run/memlane-qemu/db-2.sock")));
}

#[test]
fn what_is_lacking_is_named_with_the_lines_to_add() {
    for (part, lines) in [
        ("memlane-libvirt/web1.qmp", "unix:/run/memlane-libvirt/web1.qmp,server=on,wait=off"),
        ("access mode", "<access mode='shared'/>"),
        ("source type='file'", "<source type='file'/>"),
        ("LD_PRELOAD", "<qemu:env name='LD_PRELOAD' value='/usr/lib/memlane/libmemlane_shim.so'/>"),
        (
            "MEMLANE_ATTACH_SOCKET",
            "<qemu:env name='MEMLANE_ATTACH_SOCKET' value='/run/memlane/attach.sock'/>",
        ),
    ] {
        let told = refused(&without(OF_9, part));
        assert!(told.contains(lines) && told.contains("virsh edit web1"), "{part}: {told}");
        assert!(!told.contains("xmlns:qemu"), "{told}");
    }
    // libvirt drops pass-through whose namespace was not declared.
    let told = refused(&without(OF_11, "name='qemu'").replace("memlane-qemu", "qemu-system-x86_64"));
    for part in [
        "xmlns:qemu",
        "LD_PRELOAD",
        "MEMLANE_ATTACH_SOCKET",
        "memoryBacking",
        "-qmp",
        "/usr/bin/memlane-qemu",
    ] {
        assert!(told.contains(part), "{part}: {told}");
    }
}

#[test]
fn a_domain_that_does_not_run_has_no_monitor() {
    let told = refused(&OF_9.replace(" id='3'", ""));
    assert!(told.contains("virsh start web1"), "{told}");
}

#[test]
fn what_is_no_domain_is_refused() {
    for xml in ["", "web1", "<domain", "<network><name>default</name></network>", "<domain id='1'/>"] {
        assert!(read(xml).is_err(), "{xml}");
    }
    let told = refused(&OF_11.replace("db-2", "two words"));
    assert!(told.contains("--qmp"), "{told}");
    // An entity that grows is not expanded.
    let bomb =
        "<!DOCTYPE d [<!ENTITY a 'aaaa'><!ENTITY b '&a;&a;'>]><domain id='1'><name>&b;</name></domain>";
    assert!(read(bomb).is_err());
}

#[test]
fn monitors_are_found_however_they_are_written() {
    let path = |words: &[&str]| monitor(words).map(|path| path.display().to_string());
    let socket = "socket,id=m,path=/run/m.sock,server=on,wait=off";
    assert_eq!(path(&["-qmp", "unix:/run/m.qmp,server,nowait"]).unwrap(), "/run/m.qmp");
    assert_eq!(path(&["-chardev", socket, "-mon", "chardev=m,mode=control"]).unwrap(), "/run/m.sock");
    assert_eq!(path(&["--mon", "m,mode=control", "--chardev", socket]).unwrap(), "/run/m.sock");
    for wrong in [
        &["-qmp", "unix:/run/m.qmp"][..],
        &["-qmp", "unix:m.qmp,server=on"],
        &["-qmp", "tcp:localhost:4444,server=on"],
        &["-qmp"],
        &["qmp", "unix:/run/m.qmp,server=on"],
        &["-chardev", socket, "-mon", "chardev=m,mode=readline"],
        &["-chardev", socket, "-mon", "chardev=other,mode=control"],
        &["-chardev", "socket,id=m,path=/run/m.sock", "-mon", "chardev=m,mode=control"],
    ] {
        assert_eq!(path(wrong), None, "{wrong:?}");
    }
}

#[test]
fn memory_is_shared_as_a_whole_or_node_by_node() {
    let shared = |xml: &str| has_shared_memory(Document::parse(xml).unwrap().root_element());
    let file = "<source type='file'/>";
    let cells = |one, other| {
        format!("<cpu><numa><cell id='0' memAccess='{one}'/><cell id='1' memAccess='{other}'/></numa></cpu>")
    };
    assert!(shared(&format!(
        "<domain><memoryBacking>{file}</memoryBacking>{}</domain>",
        cells("shared", "shared")
    )));
    assert!(shared("<domain><memoryBacking><hugepages/><access mode='shared'/></memoryBacking></domain>"));
    assert!(!shared(&format!(
        "<domain><memoryBacking>{file}</memoryBacking>{}</domain>",
        cells("shared", "private")
    )));
    let overruled = format!(
        "<domain><memoryBacking>{file}<access mode='shared'/></memoryBacking>{}</domain>",
        cells("private", "shared")
    );
    assert!(!shared(&overruled));
    assert!(!shared(
        "<domain><memoryBacking><source type='memfd'/><access mode='shared'/></memoryBacking></domain>"
    ));
}

#[test]
fn names_that_virsh_would_take_for_options_are_refused() {
    for name in ["", "-c", "--help", "a\nb"] {
        let error = monitor_of(name).unwrap_err();
        assert!(error.to_string().contains("cannot be the name of a domain"), "{name:?}: {error}");
    }
}
