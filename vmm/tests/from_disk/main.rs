//! Kernels found on disks: every method, on every kind of table, with contents checked byte for byte; what is said
//! where there is none; and damaged disks.
#![allow(missing_docs, clippy::unwrap_used)]

mod hostile;
mod images;

use images::{OnHost, Tree, disk, disk_4k, find, noise, read};
use sapwood_vmm::from_disk::{self, FindError};

const UUID: &str = "11111111-2222-3333-4444-555555555555";
const OTHER: &str = "99999999-2222-3333-4444-555555555555";
const ESP: &str = "C12A7328-F81F-11D2-BA4B-00A0C93EC93B";
const XBOOTLDR: &str = "BC13C2FF-59E6-4262-A352-B275FD6F7172";
const ROOT: &str = "4F68BCE3-E8CD-4DB1-96E7-FBCAF984B709";
const LINUX: &str = "0FC63DAF-8483-4772-8E79-3D69D8477DE4";

fn kernel() -> Vec<u8> {
    noise(1, 300_001)
}

fn initrd() -> Vec<u8> {
    noise(2, 200_003)
}

/// What Debian has, by its names.
fn debian(version: &str) -> Tree {
    Tree::new()
        .file("/etc/fstab", "# nothing\n")
        .file(&format!("/boot/vmlinuz-{version}"), kernel())
        .file(&format!("/boot/initrd.img-{version}"), initrd())
}

#[track_caller]
fn check(disk: &[u8], wanted: Option<&str>, cmdline: &str, origin: &str) {
    let mut found = find(disk, wanted).unwrap_or_else(|error| panic!("{error}"));
    assert!(read(&mut found.kernel) == kernel(), "{}: the kernel", found.origin);
    assert!(read(found.initrd.as_mut().unwrap()) == initrd(), "{}: the initrd", found.origin);
    assert_eq!(found.cmdline, cmdline);
    assert_eq!(found.origin, origin);
}

#[track_caller]
fn refusal(disk: &[u8], wanted: Option<&str>) -> String {
    find(disk, wanted).expect_err("nothing to boot").to_string()
}

#[test]
fn debian_names_on_a_disk_without_a_table() {
    let image = debian("6.1.0-9-amd64")
        .file("/boot/vmlinuz-6.1.0-10-rescue", "rescue")
        .file("/boot/vmlinuz-6.1.0-8-amd64", "older")
        .ext4(8, UUID);
    check(
        &image,
        None,
        &format!("root=UUID={UUID} ro console=ttyS0"),
        "no partition table, the whole disk (ext4): /boot/vmlinuz-6.1.0-9-amd64, by its name",
    );
    let mut older = find(&image, Some("6.1.0-8-amd64")).unwrap();
    assert_eq!(read(&mut older.kernel), b"older");
    assert!(older.initrd.is_none());
    assert_eq!(older.cmdline, "root=/dev/vda ro console=ttyS0", "no initrd that could look for a UUID");
}

#[test]
fn links_lead_to_the_kernel() {
    for target in ["boot/vmlinuz-6.1.0-9-amd64", "/usr/../boot/./now"] {
        let image = debian("6.1.0-9-amd64")
            .file("/boot/vmlinuz-6.1.0-10-amd64", "newer")
            .file("/usr/x", "")
            .link("/boot/now", "vmlinuz-6.1.0-9-amd64")
            .link("/vmlinuz", target)
            .ext4(8, UUID);
        check(
            &image,
            None,
            &format!("root=UUID={UUID} ro console=ttyS0"),
            "no partition table, the whole disk (ext4): /boot/vmlinuz-6.1.0-9-amd64, by its name",
        );
    }
    let circle =
        Tree::new().link("/vmlinuz", "/boot/vmlinuz").link("/boot/vmlinuz", "../vmlinuz").ext4(8, UUID);
    assert!(refusal(&circle, None).contains("no vmlinuz"), "a circle is no kernel");
}

#[test]
fn names_on_partitions_of_both_tables() {
    let root = debian("6.1.0-9-amd64").ext4(8, UUID);
    let cmdline = format!("root=UUID={UUID} ro console=ttyS0");
    let small = disk(&format!("label: gpt\nstart=4096, type={ROOT}\n"), 12, &[(2, &root)]);
    let large = disk_4k(&format!("g\nn\n1\n512\n\nt\n{ROOT}\nw\n"), 12, &[(2, &root)]);
    for (sector, image) in [(512, small), (4096, large)] {
        assert!(image[sector..].starts_with(b"EFI PART"), "the sectors are as they should be");
        let origin = "GPT, partition 1 (ext4): /boot/vmlinuz-6.1.0-9-amd64, by its name";
        check(&image, None, &cmdline, origin);
        // The first copy of the table is lost.
        let mut damaged = image;
        damaged[sector..2 * sector].fill(0);
        check(&damaged, None, &cmdline, origin);
    }
    let mbr = disk("label: dos\nstart=4096, type=83\n", 12, &[(2, &root)]);
    check(&mbr, None, &cmdline, "MBR, partition 1 (ext4): /boot/vmlinuz-6.1.0-9-amd64, by its name");
    let script = "label: dos\nstart=2048, size=2048, type=82\nstart=4096, size=26624, type=5\n\
                  start=6144, size=2048, type=82\nstart=10240, size=16384, type=83\n";
    let logical = disk(script, 16, &[(5, &root)]);
    check(&logical, None, &cmdline, "MBR, partition 6 (ext4): /boot/vmlinuz-6.1.0-9-amd64, by its name");
}

#[test]
fn a_boot_partition_of_its_own_needs_a_root() {
    let boot = Tree::new()
        .file("/vmlinuz-6.1.0-9-amd64", kernel())
        .file("/initrd.img-6.1.0-9-amd64", initrd())
        .ext4(8, OTHER);
    let uuid = "0A0A0A0A-2222-3333-4444-555555555555";
    let script =
        format!("label: gpt\nstart=4096, size=16384, type={LINUX}\nstart=20480, type={ROOT}, uuid={uuid}\n");
    let unread = disk(&script, 16, &[(2, &boot)]);
    let origin = "GPT, partition 1 (ext4): /vmlinuz-6.1.0-9-amd64, by its name";
    check(&unread, None, &format!("root=PARTUUID={} ro console=ttyS0", uuid.to_lowercase()), origin);

    let root = Tree::new().file("/etc/fstab", "").ext4(4, UUID);
    let script = "label: dos\nlabel-id: 0xCAFE1234\nstart=4096, size=16384, type=83\nstart=20480, size=8192, type=83\n";
    let read = disk(script, 16, &[(2, &boot), (10, &root)]);
    let origin = "MBR, partition 1 (ext4): /vmlinuz-6.1.0-9-amd64, by its name";
    check(&read, None, &format!("root=UUID={UUID} ro console=ttyS0"), origin);

    let xfs = disk(script, 16, &[(2, &boot), (10, b"XFSB")]);
    check(&xfs, None, "root=PARTUUID=cafe1234-02 ro console=ttyS0", origin);
    assert!(refusal(&boot, None).contains("/vmlinuz-6.1.0-9-amd64: the root file system was not found"));
}

const ENTRY: &str = "title Debian\nversion 6.1.0-9\nmachine-id abc\nsort-key debian\n\
    linux /kernels/vmlinuz-6.1.0-9\ninitrd /kernels/one\ninitrd /kernels/two\noptions root=LABEL=x\noptions quiet console=hvc0\n";

#[test]
fn boot_loader_entries_on_the_system_partition() {
    let (one, two) = (noise(3, 4097), noise(4, 8));
    for bits in [16, 32] {
        let mib = if bits == 32 { 40 } else { 20 };
        let esp = Tree::new()
            .file("/loader/entries/debian-9+2-1.conf", ENTRY)
            .file("/loader/entries/other.conf", "title Other\nsort-key z\nlinux /kernels/other\n")
            .file("/loader/entries/arm.conf", "title Arm\nsort-key a\nlinux /x\narchitecture aa64\n")
            .file("/loader/entries/shell.conf", "title Shell\nsort-key a\nefi /shell.efi\n")
            .file("/kernels/vmlinuz-6.1.0-9", kernel())
            .file("/kernels/other", "other")
            .file("/kernels/one", &one)
            .file("/kernels/two", &two)
            .fat(mib, bits, "12345678");
        let script = format!("label: gpt\nstart=2048, type={ESP}\n");
        let image = disk(&script, mib + 3, &[(1, &esp)]);
        let mut found = find(&image, None).unwrap();
        assert!(read(&mut found.kernel) == kernel());
        let padded = [one.as_slice(), &[0; 3], &two].concat();
        assert!(read(found.initrd.as_mut().unwrap()) == padded, "each at a multiple of four bytes");
        assert_eq!(
            (found.title.as_str(), found.cmdline.as_str()),
            ("Debian", "root=LABEL=x quiet console=hvc0")
        );
        let origin = "GPT, partition 1 (FAT): /loader/entries/debian-9.conf, an entry by the Boot Loader Specification";
        assert_eq!(found.origin, origin);
        for wanted in ["Other", "other", "other.conf"] {
            let mut other = find(&image, Some(wanted)).unwrap();
            assert_eq!(read(&mut other.kernel), b"other");
            assert!(other.initrd.is_none());
        }
        let message = refusal(&image, Some("6.2"));
        assert!(
            message.contains("no boot entry \"6.2\"") && message.contains("Debian (debian-9)"),
            "{message}"
        );
    }
}

#[test]
fn entries_of_two_partitions_are_one_list_with_a_default() {
    let entry = |version: &str| {
        format!("title Debian {version}\nsort-key debian\nversion {version}\nlinux /k\ninitrd /i\n")
    };
    let esp = Tree::new()
        .file("/loader/loader.conf", "timeout 3\ndefault debian-7*\n")
        .file("/loader/entries/debian-9.conf", entry("9"))
        .file("/k", "of the ESP")
        .file("/i", "")
        .fat(20, 16, "12345678");
    let boot = Tree::new()
        .file("/loader/entries/debian-7.conf", entry("7"))
        .file("/loader/entries/debian-10.conf", entry("10"))
        .file("/k", kernel())
        .file("/i", initrd())
        .ext4(8, OTHER);
    let script = format!("label: gpt\nstart=2048, size=40960, type={ESP}\nstart=43008, type={XBOOTLDR}\n");
    let image = disk(&script, 32, &[(1, &esp), (21, &boot)]);
    let origin = |version| {
        format!(
            "GPT, partition 2 (ext4): /loader/entries/debian-{version}.conf, an entry by the Boot Loader Specification"
        )
    };
    check(&image, None, "console=ttyS0", &origin(7));
    check(&image, Some("10"), "console=ttyS0", &origin(10));
    let mut of_esp = find(&image, Some("9")).unwrap();
    assert_eq!(read(&mut of_esp.kernel), b"of the ESP");
}

#[test]
fn entries_below_boot_of_a_root_file_system() {
    // As Fedora has it: paths from /boot, and a variable of GRUB.
    let image = Tree::new()
        .file("/boot/loader/entries/f-6.9.conf", "title F\nversion 6.9\nlinux /vmlinuz-6.9\ninitrd /initrd $tuned\noptions $kernelopts rhgb $none\n")
        .file("/boot/grub2/grubenv", "# GRUB Environment Block\nkernelopts=root=UUID=f ro\n####")
        .file("/boot/vmlinuz-6.9", kernel())
        .file("/boot/initrd", initrd())
        .ext4(8, UUID);
    check(
        &image,
        None,
        "root=UUID=f ro rhgb console=ttyS0",
        "no partition table, the whole disk (ext4): /boot/loader/entries/f-6.9.conf, an entry by the Boot Loader Specification",
    );
}

/// In the shape that Debian 12's grub-mkconfig writes.
fn grub_cfg(root: &str) -> String {
    let entry = |title: &str, id: &str, version: &str, options: &str| {
        format!(
            r#"menuentry '{title}' --class debian --class gnu-linux $menuentry_id_option '{id}-{root}' {{
    load_video
    insmod gzio
    if [ x$grub_platform = xxen ]; then insmod xzio; insmod lzopio; fi
    insmod part_gpt
    set root='hd0,gpt9'
    if [ x$feature_platform_search_hint = xy ]; then
      search --no-floppy --fs-uuid --set=root --hint-bios=hd0,gpt1 {root}
    else
      search --no-floppy --fs-uuid --set=root {root}
    fi
    echo    'Loading Linux {version} ...'
    linux    /boot/vmlinuz-{version} root=UUID={root} ro {options}
    echo    'Loading initial ramdisk ...'
    initrd    /boot/initrd.img-{version}
}}
"#
        )
        .replace("    ", "\t")
    };
    let header = r#"#
# DO NOT EDIT THIS FILE
if [ -s $prefix/grubenv ]; then
  set have_grubenv=true
  load_env
fi
if [ "${next_entry}" ] ; then
   set default="${next_entry}"
   set next_entry=
   save_env next_entry
   set boot_once=true
else
   set default="${saved_entry}"
fi
function savedefault {
  if [ -z "${boot_once}" ]; then
    saved_entry="${chosen}"
    save_env saved_entry
  fi
}
if [ x"${feature_menuentry_id}" = xy ]; then
  menuentry_id_option="--id"
else
  menuentry_id_option=""
fi
export menuentry_id_option
"#;
    let sub = format!(
        "submenu 'Advanced options' $menuentry_id_option 'advanced-{root}' {{\n{}{}}}\n",
        entry("Debian, with Linux 6.1.0-9-amd64", "simple", "6.1.0-9-amd64", "quiet"),
        entry("Debian, with Linux 6.1.0-8-amd64", "old", "6.1.0-8-amd64", "single console=tty0"),
    );
    format!(
        "{header}{}{sub}menuentry 'Firmware' {{\n fwsetup\n}}\n",
        entry("Debian", "main", "6.1.0-9-amd64", "quiet")
    )
}

#[test]
fn grub_configurations() {
    let tree = || {
        debian("6.1.0-9-amd64")
            .file("/boot/vmlinuz-6.1.0-8-amd64", "older")
            .file("/boot/initrd.img-6.1.0-8-amd64", "initrd of the older")
            .file("/boot/grub/grub.cfg", grub_cfg(UUID))
    };
    let script = format!("label: gpt\nstart=2048, size=2048, type={ESP}\nstart=4096, type={LINUX}\n");
    let plain = disk(&script, 12, &[(2, &tree().ext4(8, UUID))]);
    let origin =
        |title: &str| format!("GPT, partition 2 (ext4): /boot/grub/grub.cfg, entry {title:?} of GRUB");
    let cmdline = format!("root=UUID={UUID} ro quiet console=ttyS0");
    check(&plain, None, &cmdline, &origin("Debian"));
    check(&plain, Some("6.1.0-9-amd64"), &cmdline, &origin("Debian"));
    check(&plain, Some(&format!("main-{UUID}")), &cmdline, &origin("Debian"));
    let saved = [
        "1>1".to_owned(),
        format!("advanced-{UUID}>old-{UUID}"),
        "Advanced options>Debian, with Linux 6.1.0-8-amd64".to_owned(),
    ];
    for saved in saved {
        let environment = format!("# GRUB Environment Block\nsaved_entry={saved}\nnext_entry=0\n#####");
        let tree = tree().file("/boot/grub/grubenv", environment);
        let image = disk(&script, 12, &[(2, &tree.ext4(8, UUID))]);
        let mut found = find(&image, None).unwrap();
        assert_eq!(read(&mut found.kernel), b"older", "{saved}");
        assert_eq!(found.cmdline, format!("root=UUID={UUID} ro single console=tty0"));
        check(&image, Some("Debian"), &cmdline, &origin("Debian"));
    }
    // A default that is not there, and an entry whose kernel is gone: the next one that works.
    let gone = Tree::new()
        .file("/boot/grub/grub.cfg", grub_cfg(UUID))
        .file("/boot/vmlinuz-6.1.0-8-amd64", "older")
        .file("/boot/initrd.img-6.1.0-8-amd64", "i")
        .ext4(8, UUID);
    let mut found = find(&gone, None).unwrap();
    assert_eq!(read(&mut found.kernel), b"older");
}

#[test]
fn grub_on_a_boot_partition_of_its_own() {
    let config = format!(
        "set default=0\nmenuentry 'D' {{\n set root='hd0,msdos1'\n linux /vmlinuz root=/dev/vda2\n initrd (hd0,msdos2)/i\n}}\n\
         menuentry 'elsewhere' {{\n search --fs-uuid --set=root {OTHER}\n linux /k\n initrd /i\n}}\n"
    );
    let boot = Tree::new().file("/grub/grub.cfg", config).file("/vmlinuz", kernel()).ext4(8, UUID);
    let root = Tree::new().file("/i", initrd()).file("/k", kernel()).ext4(4, OTHER);
    let script = "label: dos\nstart=4096, size=16384, type=83\nstart=20480, size=8192, type=83\n";
    let image = disk(script, 16, &[(2, &boot), (10, &root)]);
    let origin = |title: &str| format!("MBR, partition 1 (ext4): /grub/grub.cfg, entry {title:?} of GRUB");
    check(&image, None, "root=/dev/vda2 console=ttyS0", &origin("D"));
    check(&image, Some("elsewhere"), "console=ttyS0", &origin("elsewhere"));
}

#[test]
fn a_default_without_its_kernel_gives_way_to_the_next_method() {
    let image = debian("6.1.0-9-amd64").file("/boot/loader/entries/a.conf", "linux /gone\n").ext4(8, UUID);
    let cmdline = format!("root=UUID={UUID} ro console=ttyS0");
    check(
        &image,
        None,
        &cmdline,
        "no partition table, the whole disk (ext4): /boot/vmlinuz-6.1.0-9-amd64, by its name",
    );
    let message = refusal(&image, Some("a"));
    assert!(message.contains("a.conf") && message.contains("/gone is not there"), "{message}");
}

#[test]
fn messages_say_what_was_tried() {
    let message = refusal(&vec![0; 1 << 20], None);
    assert!(message.contains("the whole disk: no file system that is known here"), "{message}");
    assert!(message.contains("--kernel"), "{message}");
    let empty = Tree::new().file("/etc/fstab", "").ext4(8, UUID);
    assert!(
        refusal(&empty, None).contains("the whole disk (ext4): no boot entries, no grub.cfg, no vmlinuz")
    );
    let unified = Tree::new().file("/EFI/Linux/debian.efi", "MZ").fat(20, 16, "12345678");
    assert!(refusal(&unified, None).contains("/EFI/Linux/debian.efi: unified kernel images are not read"));
    let script = format!("label: gpt\nstart=4096, type={LINUX}\n");
    let locked = disk(&script, 12, &[(2, b"LUKS\xba\xbe")]);
    assert!(refusal(&locked, None).contains("(GPT):\n  partition 1: an encrypted volume"));
    assert!(matches!(find(&[], None), Err(FindError::Nothing { .. })));
    assert!(matches!(find(&[1; 700], None), Err(FindError::Nothing { .. })));
}

#[test]
fn what_a_disk_says_cannot_control_the_terminal() {
    let entry = "title \u{1b}[2J\u{7}Evil\nlinux /gone\u{1b}\n";
    let image = Tree::new().file("/loader/entries/a.conf", entry).ext4(8, UUID);
    for wanted in [None, Some("b")] {
        let message = refusal(&image, wanted);
        assert!(!message.contains(['\u{1b}', '\u{7}']), "{message:?}");
    }
    let entry = entry.replace("linux /gone\u{1b}", "linux /k\noptions a\u{1b}b");
    let image = Tree::new().file("/loader/entries/a.conf", entry).file("/k", "k").ext4(8, UUID);
    let found = find(&image, None).unwrap();
    assert_eq!((found.title.as_str(), found.cmdline.as_str()), ("?[2J?Evil", "a b console=ttyS0"));
}

#[test]
fn arguments_are_appended() {
    let mut found = find(&debian("6.1.0-9-amd64").ext4(8, UUID), None).unwrap();
    found.append("");
    assert_eq!(found.cmdline, format!("root=UUID={UUID} ro console=ttyS0"));
    found.append(" single ");
    assert_eq!(found.cmdline, format!("root=UUID={UUID} ro console=ttyS0 single"));
}

/// `SAPWOOD_FROM_DISK_IMAGE` names a disk to try by hand; what is found on it is printed.
#[test]
fn a_disk_of_the_users() {
    let Some(path) = std::env::var_os("SAPWOOD_FROM_DISK_IMAGE") else { return };
    let begun = std::time::Instant::now();
    let disk = OnHost(std::fs::File::open(path).unwrap());
    let wanted = std::env::var("SAPWOOD_FROM_DISK_ENTRY").ok();
    match from_disk::find(Box::new(disk), wanted.as_deref()) {
        Ok(found) => {
            println!("{found:#?}\n{:?}", begun.elapsed());
            for (name, file) in [("kernel", Some(found.kernel)), ("initrd", found.initrd)] {
                let Some(mut file) = file else { continue };
                std::io::copy(
                    &mut file,
                    &mut std::fs::File::create(format!("/tmp/from-disk-{name}")).unwrap(),
                )
                .unwrap();
            }
        }
        Err(error) => panic!("{error}"),
    }
}
