use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;

use super::*;
use crate::host::HugePages;

const MAIN: &str = "share=on,size=134217728B,mem-path=/dev/shm,x-use-canonical-path-for-ramblock-id=off";

fn host() -> Host {
    let hugetlbfs = vec![HugePages { path: "/dev/hugepages".into(), page_bytes: 2 << 20 }];
    Host { ram: "/dev/shm".into(), room: Ok(64 << 30), hugetlbfs, huge_page: Some(2 << 20) }
}

fn words(line: &str) -> Vec<OsString> {
    line.split_whitespace().map(Into::into).collect()
}

fn of(line: &str) -> Rewritten {
    rewrite(&words(line), host())
}

/// Returns the changed line, which nothing is wrong with.
fn changed(line: &str) -> String {
    let rewritten = of(line);
    assert_eq!(rewritten.warnings, [], "{line}");
    rewritten.arguments.join(OsStr::new(" ")).into_string().unwrap()
}

/// Returns the only warning about a line, which stays as it is.
fn warned(line: &str) -> String {
    let rewritten = of(line);
    assert_eq!(rewritten.arguments, words(line));
    assert_eq!(rewritten.warnings.len(), 1, "{:?}", rewritten.warnings);
    let told = rewritten.warnings[0].to_string();
    assert!(told.contains(": the guest starts, but cannot be moved: "), "{told}");
    told
}

#[test]
fn plain_memory_becomes_a_shared_file() {
    for (line, id, bytes) in [
        ("disk.img", "pc.ram", 128u64 << 20),
        ("-m 2048", "pc.ram", 2 << 30),
        ("-m 2G --machine pc-i440fx-9.0,accel=kvm", "pc.ram", 2 << 30),
        ("-M q35 -m size=1.5G,slots=4,maxmem=16G", "pc.ram", 3 << 29),
        ("-machine hpet=off,type=pc+pve0 -m 1025k", "pc.ram", (1 << 20) + 8192),
        ("-machine isapc -machine accel=tcg -m 1G -m slots=2,maxmem=2G", "pc.ram", 1 << 30),
        ("-M xenfv", "pc.ram", 128 << 20),
        ("-M microvm -m 3g", "microvm.ram", 3 << 30),
    ] {
        let object = MAIN.replace("134217728", &bytes.to_string());
        let added =
            format!("{line} -object memory-backend-file,id={id},{object} -machine memory-backend={id}");
        assert_eq!(changed(line), added);
    }
}

#[test]
fn a_path_and_preallocation_are_kept() {
    let line = changed("-mem-path /dev/hugepages -m 128 -mem-prealloc -S -name a");
    let object = MAIN.replace("/dev/shm", "/dev/hugepages");
    assert_eq!(
        line,
        format!(
            "-m 128 -mem-prealloc -S -name a -object memory-backend-file,id=pc.ram,{object},prealloc=on -machine \
             memory-backend=pc.ram"
        )
    );
    // Then it says nothing about RAM.
    let line = changed(
        "-mem-path /x -object memory-backend-file,id=a,share=on,size=1G,mem-path=/y -M pc,memory-backend=a",
    );
    assert!(line.starts_with("-mem-path /x "));
}

#[test]
fn a_private_file_with_data_stays_private() {
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(&file, "data").unwrap();
    let told = warned(&format!("-m 1G -mem-path {}", file.path().display()));
    assert!(told.contains("the guest's RAM is a private copy of"), "{told}");
}

#[test]
fn what_is_not_understood_stays() {
    for (line, why) in [
        ("-machine nonesuch-1.0 -m 1G", "the machine nonesuch-1.0"),
        ("-numa node,mem=1G -m 1G", "by mem="),
        ("-m much", "-m has much"),
        ("-M pc,memory.size=2G", "memory.size="),
        ("-m 65G", "does not fit into /dev/shm"),
        ("-object {\"qom-type\": -M pc,memory-backend=a", "cannot read -object"),
        ("-readconfig /nonexistent/file -m 1G", "-readconfig"),
        ("-M q35,confidential-guest-support=sev0 -object memory-backend-ram,id=a,size=1G", "confidential"),
    ] {
        let told = warned(line);
        assert!(told.contains(why), "{told}");
    }
}

#[test]
fn backends_of_numa_nodes_are_shared_and_keep_their_names() {
    let line = "-m 2G --object memory-backend-ram,id=ram-node0,size=1G,host-nodes=0,host-nodes=1,policy=bind \
                -numa node,nodeid=0,cpus=0-1,memdev=ram-node0 \
                -object memory-backend-memfd,id=ram-node1,size=1G,share=off,policy=preferred \
                -numa node,nodeid=1,cpus=2-3,memdev=ram-node1";
    let expected = "-m 2G --object memory-backend-file,id=ram-node0,size=1G,host-nodes=0,host-nodes=1,policy=bind,\
                    share=on,mem-path=/dev/shm,x-use-canonical-path-for-ramblock-id=off \
                    -numa node,nodeid=0,cpus=0-1,memdev=ram-node0 \
                    -object memory-backend-file,id=ram-node1,size=1G,share=on,policy=preferred,mem-path=/dev/shm \
                    -numa node,nodeid=1,cpus=2-3,memdev=ram-node1";
    assert_eq!(changed(line), expected);
}

#[test]
fn the_backend_of_the_machine_is_shared() {
    let line = "-M pc,memory-backend=pc.ram -object {\"qom-type\":\"memory-backend-ram\",\"id\":\"pc.ram\",\"size\":1073741824}";
    let expected = "-M pc,memory-backend=pc.ram -object {\"id\":\"pc.ram\",\"mem-path\":\"/dev/shm\",\
                    \"qom-type\":\"memory-backend-file\",\"share\":true,\"size\":1073741824,\
                    \"x-use-canonical-path-for-ramblock-id\":false}";
    assert_eq!(changed(line), expected);
}

#[test]
fn what_is_shared_already_stays_byte_for_byte() {
    for line in [
        "-M pc,memory-backend=a -object memory-backend-file,share=on,id=a,size=1G,mem-path=/dev/hugepages,prealloc=yes",
        "-numa node,memdev=a -object {\"share\":true,\"qom-type\":\"memory-backend-file\",\"id\":\"a\",\"mem-path\":\"/x\"}",
    ] {
        assert_eq!(changed(line), line);
    }
}

#[test]
fn dimms_are_shared_beside_plain_memory() {
    let line = changed(
        "-m 128,slots=2,maxmem=1G -object memory-backend-ram,id=mem1,size=64M -device pc-dimm,memdev=mem1",
    );
    let dimm = "memory-backend-file,id=mem1,size=64M,share=on,mem-path=/dev/shm,x-use-canonical-path-for-ramblock-id=off";
    assert_eq!(
        line,
        format!(
            "-m 128,slots=2,maxmem=1G -object {dimm} -device pc-dimm,memdev=mem1 -object memory-backend-file,id=pc.ram,{MAIN} \
             -machine memory-backend=pc.ram"
        )
    );
}

#[test]
fn one_backend_without_a_place_leaves_the_others_their_change() {
    let line = "-M pc,memory-backend=a -object memory-backend-memfd,id=a,size=1G,hugetlb=on,hugetlbsize=1G \
                -object memory-backend-memfd,id=b,size=1G,hugetlb=on";
    let rewritten = of(line);
    assert_eq!(rewritten.warnings.len(), 1);
    assert_eq!(rewritten.arguments[..5], words(line)[..5]);
    assert_eq!(rewritten.arguments[5], "memory-backend-file,id=b,size=1G,share=on,mem-path=/dev/hugepages");
}

#[test]
fn arguments_that_are_no_text_are_passed_on() {
    let odd = OsStr::from_bytes(b"memory-backend-ram,id=\xff");
    let mut line = words("-M pc,memory-backend=a -object");
    line.push(odd.to_owned());
    let rewritten = rewrite(&line, host());
    assert_eq!(rewritten.arguments, line);
}

#[test]
fn a_file_and_the_command_line_say_it_together() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let path = file.path().to_str().unwrap();
    let text = "# CPU\n[object \"mem0\"]\nqom-type = \"memory-backend-memfd\"\nshare = \"on\"\nsize = \"1024M\"\n\n[numa]\n\
                type = \"node\"\nmemdev = \"mem0\"\n[object \"rng\"]\nqom-type = \"rng-random\"\n";
    fs::write(path, text).unwrap();
    let rewritten = of(&format!("-mem-prealloc -readconfig {path} -m 1G"));
    assert_eq!(rewritten.warnings, []);
    assert_eq!(rewritten.arguments, words(&format!("-mem-prealloc -readconfig {path} -m 1G")));
    let expected = text
        .replace("memory-backend-memfd", "memory-backend-file")
        .replace("1024M\"\n", "1024M\"\nmem-path = \"/dev/shm\"\n");
    assert_eq!(rewritten.files, BTreeMap::from([(2, expected)]));

    // The size and the machine are in the file, which need not be changed then.
    fs::write(path, "[machine]\ntype = \"microvm\"\n[memory]\nsize = \"128M\"\n[name]\nguest = \"web1\"\n")
        .unwrap();
    let rewritten = of(&format!("-mem-path /dev/shm/x -readconfig {path} -name debug-threads=on"));
    let object = MAIN.replace("/dev/shm", "/dev/shm/x");
    let expected = words(&format!(
        "-readconfig {path} -name debug-threads=on -object memory-backend-file,id=microvm.ram,{object} -machine \
         memory-backend=microvm.ram"
    ));
    assert_eq!((rewritten.arguments, rewritten.files.len()), (expected, 0));
    assert_eq!(rewritten.name.as_deref(), Some("web1"));

    // The place of a changed file is counted without what is left out before it.
    fs::write(path, "[object \"d\"]\nqom-type = \"memory-backend-ram\"\nsize = \"64M\"\n").unwrap();
    let rewritten = of(&format!("-mem-path /dev/shm/x -readconfig {path}"));
    assert_eq!(rewritten.files.keys().collect::<Vec<_>>(), [&1]);
    assert_eq!(rewritten.arguments[1], path);
}

#[test]
fn the_name_and_a_monitor_are_found() {
    for (line, name) in [
        ("-name web1", Some("web1")),
        ("-name guest=web1,debug-threads=on", Some("web1")),
        ("-name old -name web1,debug-threads=on", Some("web1")),
        ("-name web,,1 -name process=x", Some("web,1")),
        ("-m 1G", None),
    ] {
        let found = of(line);
        assert_eq!((found.name.as_deref(), found.has_monitor), (name, false), "{line}");
    }
    assert!(of("-chardev socket,id=memlane-monitor,path=/x,server=on").has_monitor);
}
