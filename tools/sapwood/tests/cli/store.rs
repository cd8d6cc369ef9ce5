//! Stores by the command line: the same commands with and without a daemon, and the same answers.

#![allow(clippy::unwrap_used)] // A test, though not in a `#[test]` function.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::thread;
use std::time::Duration;

use serde_json::{Value, json};

use crate::daemon::Daemon;
use crate::harness::{Answer, Place};

/// A folder with a store in `vms`, and a raw disk.
pub fn place() -> Place {
    let place = Place::new();
    place.raw_disk("disk.raw");
    place.sapwood("store init -q vms").text();
    place
}

/// What a command about the store in `vms` answers; `:` begins names there.
pub fn about(place: &Place, line: &str) -> Answer {
    let line: Vec<String> = line
        .split(' ')
        .map(|word| match word.strip_prefix(':') {
            Some(name) => format!("vms:{name}"),
            None => word.to_owned(),
        })
        .collect();
    place.sapwood(&line.join(" "))
}

/// A text without what differs each time: ids, times, ages, what the catalog takes, and the folder.
fn same(place: &Place, text: &str) -> String {
    let root = fs::canonicalize(place.path("")).unwrap().display().to_string();
    let text = text.replace(root.trim_end_matches('/'), "ROOT");
    let mut result = String::new();
    // What is taken and left is not the same while the catalog is open.
    let is_same = |line: &&str| !["takes: ", "left: "].iter().any(|start| line.starts_with(start));
    for line in text.lines().filter(is_same) {
        let line = line.split_inclusive("no room left").next().unwrap_or_default();
        let mut words: Vec<String> = line.split(' ').map(str::to_owned).collect();
        for index in 0..words.len() {
            let hex = words[index].chars().filter(char::is_ascii_hexdigit).count();
            if hex >= 32 {
                words[index] = "ID".to_owned();
            } else if index > 0
                && ["-ms\":", "\"catalog-bytes\":", "\"left-bytes\":"]
                    .iter()
                    .any(|end| words[index - 1].ends_with(end))
            {
                words[index] = "NUMBER".to_owned();
            } else if index > 0
                && words[index] == "s"
                && words[index - 1].trim_start_matches('(').parse::<u64>().is_ok()
            {
                words[index - 1] = "AGE".to_owned();
            }
        }
        result.push_str(words.join(" ").trim_end());
        result.push('\n');
    }
    result
}

/// One command after the other; what each is to answer: its exit code and a part of its text.
const LIFE: &[(&str, i32, &str)] = &[
    ("create :web 1M", 0, "Created web: volume, 1 MiB (1048576 bytes)\n"),
    ("create :web 1M", 1, "web: there is a volume of that name"),
    ("create :odd 1000", 0, "Created odd: volume, 1 KiB (1024 bytes)\n"),
    ("create :no@snapshot 1M", 1, "a volume is wanted here"),
    ("create :x", 1, "how large?"),
    ("create -f raw :x 1M", 1, "a volume has a size only"),
    ("list vms", 0, "odd   1 KiB          0  "),
    ("show :web", 0, "virtual size: 1 MiB"),
    ("show --output=json :web", 0, "\"virtual-size\": 1048576"),
    ("show :none", 1, "none: there is no such volume in the store"),
    ("info :web", 0, "volume: web"),
    ("snapshot :web@one", 0, "Took web@one\n"),
    ("snapshot :web@one", 1, "web@one: there is a snapshot of that name"),
    ("snapshot :web", 1, "say web@SNAPSHOT"),
    ("snapshot :none@one", 1, "none: there is no such volume"),
    ("clone :web@one a b", 0, "Cloned web@one to a\nCloned web@one to b\n"),
    ("clone :web@one c a", 1, "a: there is a volume of that name"),
    ("show :c", 1, "c: there is no such volume"),
    ("clone :web@two c", 1, "web@two: there is no such snapshot in the store"),
    ("snapshot :a@x", 0, "Took a@x\n"),
    ("list :a", 0, "a@x   1 MiB"),
    ("list --output=json :a", 0, "\"state\": \"bare\""),
    ("switch :b a@x", 0, "b goes on from a@x\n"),
    ("switch :b @none", 1, "b@none: there is no such snapshot"),
    ("rollback :odd", 1, "lies over no snapshot"),
    ("rollback :a", 0, "a goes on from a@x\n"),
    ("resize :a 2M", 0, "Resized a from 1 MiB (1048576 bytes) to 2 MiB (2097152 bytes)\n"),
    ("resize :a 1M", 1, "pass --shrink"),
    ("rollback :a", 1, "holds writes that are in no snapshot"),
    ("rollback --discard :a", 0, "a goes on from a@x\n"),
    ("show :a", 0, "virtual size: 1 MiB"),
    ("protect :web@one", 0, ""),
    ("delete :web@one", 1, "web@one: the snapshot is protected"),
    ("unprotect :web@one", 0, ""),
    ("delete :web", 1, "the volume has snapshots (1 of them, web@one for one)"),
    ("describe :a shop", 0, ""),
    ("label :a owner=anna tier=gold", 0, ""),
    ("label :a --remove tier", 0, ""),
    ("label :a --remove tier", 1, "it has no label tier"),
    ("label :a odd", 1, "write KEY=VALUE"),
    ("limit vms:a", 0, "no limits\n"),
    (
        "limit :a --iops 5000 --burst-iops 20000 --burst-seconds 10 --bps-write 100M --weight 200",
        0,
        "iops-total-max-length=10 weight=200\n",
    ),
    ("limit :a --in-group g", 1, "g: there is no such group in the store"),
    ("limit --store vms --group g --reserve-iops 500", 0, "group g  reserve-iops=500\n"),
    ("limit :a --in-group g --weight 0", 0, "volume a  in g: bps-write=104857600 iops-total=5000"),
    ("limit --store vms --group g --delete", 1, "g: a is in it"),
    ("limit --store vms --output=json", 0, "\"reserve-iops\": 500"),
    ("limit :a --reset --in-group none", 0, "no limits\n"),
    ("limit --store vms --group g --delete", 0, ""),
    ("limit --store vms --group g --delete", 1, "there is no such group"),
    ("limit --iops 5", 1, "what is to be limited?"),
    ("show :a", 0, "description: shop\nlabel: owner=anna\n"),
    ("rename :a aa", 0, "Renamed a to aa\n"),
    ("rename :aa@x y", 0, "Renamed aa@x to aa@y\n"),
    ("rename :aa web", 1, "web: there is a volume of that name"),
    ("rename :aa a/b", 1, "a name must not hold '/'"),
    ("tree vms", 0, "● web@one"),
    ("tree --output=json vms", 0, "\"parent\": \"aa@y\""),
    ("tree :odd", 0, "○ odd"),
    ("delete :web@one", 0, "Deleted web@one\n"),
    ("tree vms", 0, "1 deleted snapshot is kept"),
    ("delete :web :b", 0, "Deleted web\nDeleted b\n"),
    ("import -f raw disk.raw :disk", 0, "Imported disk.raw as disk@imported: 8 MiB"),
    ("import -f raw disk.raw :disk", 1, "disk: there is a volume of that name"),
    ("import disk.raw :other", 1, "disk.raw: neither a layer nor qcow2: pass -f raw"),
    ("import -f raw none.raw :other", 1, "none.raw: cannot open"),
    ("import --output=json -f raw disk.raw :other@v1", 0, "\"name\": \"other@v1\""),
    ("list :other", 0, "sealed"),
    ("diff :other@v1 disk@imported", 0, "0 B (0 bytes) differ\n"),
    ("diff --all :disk@imported", 0, "20 KiB (20480 bytes) differ\n"),
    ("diff --output=json :other@v1 @none", 1, "other@none: there is no such snapshot"),
    ("export :disk@imported disk.sapwood", 0, "Exported disk@imported to disk.sapwood: "),
    ("export :disk@imported disk.sapwood", 1, "disk.sapwood"),
    ("export :disk@imported --since other@v1 more.sapwood", 0, ", an increment\n"),
    ("import disk.sapwood :back", 0, "Imported disk.sapwood as back@imported: 8 MiB"),
    ("import disk.sapwood :back", 1, "back"),
    ("diff :disk@imported back@imported", 0, "0 B (0 bytes) differ\n"),
    ("store seal vms", 0, ""),
    ("store account vms", 0, "what is sealed holds "),
    ("show :disk@imported", 0, "exclusive, "),
    ("store gc vms", 0, "Freed "),
    ("store gc --live-percent 101 vms", 64, "101"),
    ("store check vms", 0, "No errors were found in the store\n"),
    ("store scrub vms", 0, "Everything is as it was written: "),
    ("store backup --store vms copy", 0, "Backed up vms to copy: "),
    ("store backup --store vms copy", 1, "copy: there is a store already"),
    ("store backup --store vms .", 1, "the directory is not empty"),
    ("show copy:aa@y", 0, "id: "),
    ("export copy:disk@imported copied.sapwood", 0, "Exported disk@imported to copied.sapwood: "),
    ("delete --with-snapshots :back", 0, "Deleted back\n"),
    ("store seal :none@x", 1, "none: there is no such volume"),
    ("store set --quota 5G --reserve 1M --watermarks 80,95 vms", 0, "The limits are set\n"),
    ("store set --watermarks 95,80 vms", 1, "in rising order"),
    ("store stat --output=json vms", 0, "\"quota\": 5368709120"),
    ("store set --quota 1K --watermarks 1 vms", 0, ""),
    ("store stat vms", 3, ""),
    ("store check vms", 3, "warning: the watermark of 1 % is reached\n"),
    ("snapshot :disk@full", 1, "there is no room left: the store takes "),
    ("store set --quota none --watermarks none vms", 0, ""),
    ("store stat vms", 0, "watermarks: none\n"),
    ("delete --with-snapshots :other", 0, "Deleted other\n"),
    ("delete :other", 1, "other: there is no such volume"),
];

/// All answers, which are as they must be.
fn live(place: &Place) -> Vec<(String, String)> {
    let step = |&(line, code, part): &(&str, i32, &str)| {
        let answer = about(place, line);
        let text = if [0, 3].contains(&code) { &answer.stdout } else { &answer.stderr };
        assert_eq!(answer.code, code, "{line}: {answer:?}");
        assert!(text.contains(part), "{line}: {answer:?}");
        assert!([0, 3].contains(&code) || answer.stdout.is_empty(), "{line}: {answer:?}");
        (line.to_owned(), same(place, &format!("{}{}", answer.stdout, answer.stderr)))
    };
    LIFE.iter().map(step).collect()
}

#[test]
fn a_store_lives_the_same_with_a_daemon_and_without() {
    let (alone, served) = (place(), place());
    let (daemon, line) = Daemon::start(&served, "--store vms --no-background");
    assert_eq!(line, "Serving the store vms (0 volumes) at vms/daemon.sock\n");
    for (here, there) in live(&alone).iter().zip(&live(&served)) {
        assert_eq!(here, there);
    }
    daemon.stops();
    let tree = |place: &Place| same(place, &about(place, "tree vms").text());
    assert_eq!(tree(&alone), tree(&served), "all of it was kept");
}

#[test]
fn what_was_imported_is_read_back() {
    let place = place();
    about(&place, "import -f raw disk.raw :disk").text();
    let (daemon, _) = Daemon::start(&place, "--store vms");
    about(&place, "attach :disk@imported --socket snapshot").text();
    about(&place, "attach :disk --socket volume --queues 2").text();
    for socket in ["snapshot", "volume"] {
        assert!(crate::daemon::contents(&place, socket, 8 << 20) == place.bytes("disk.raw"), "{socket}");
    }
    let serving = about(&place, "show --output=json :disk@imported").json();
    assert_eq!(serving["attached"]["read-only"], true);
    about(&place, "attach :disk@imported").fails(1, &["attached already"]);
    about(&place, "delete :disk@imported").fails(1, &["attached: detach it first"]);
    about(&place, "delete --with-snapshots :disk").fails(1, &["detach it first"]);
    about(&place, "detach :disk@imported").text();
    about(&place, "detach :disk@imported").fails(1, &["not attached"]);
    daemon.stops();
}

#[test]
fn the_default_store_is_named_or_in_the_environment() {
    let place = place();
    place.sapwood("create --store vms web 1M").text();
    place.sapwood("list").fails(1, &["which store?", "SAPWOOD_STORE"]);
    place.sapwood("show web").fails(1, &["which store?"]);
    place.sapwood("show vms:").fails(1, &["must not be empty"]);
    for line in ["list none:", "list none", "tree none"] {
        place.sapwood(line).fails(1, &["none: there is no store here"]);
    }
    for line in ["list", "list vms", "list vms:", "list --store vms", "show web", "show :web", "info :web"] {
        let mut command = place.command(crate::harness::SAPWOOD, line);
        let answer = Answer::of(command.env("SAPWOOD_STORE", "vms").output().unwrap());
        assert!(answer.text().contains("web"), "{line}");
    }
    // The path of a file stays one, whatever the environment says.
    let mut command = place.command(crate::harness::SAPWOOD, "create web 1M");
    Answer::of(command.env("SAPWOOD_STORE", "vms").output().unwrap()).text();
    assert!(place.exists("web"));
    place.sapwood("create a:b 1M").text();
    assert!(place.exists("a:b"));
    place.sapwood("create :c 1M").fails(1, &["which store?"]);
}

#[test]
fn a_second_name_says_the_same_store_or_none() {
    let place = place();
    place.sapwood("store init -q other").text();
    about(&place, "import -q -f raw disk.raw :web@1").text();
    about(&place, "snapshot :web@2").text();
    for second in ["@2", "web@2", ":web@2", "./:web@2", "vms/../vms:@2"] {
        let second = second.replace("./:", "./vms:");
        assert!(about(&place, &format!("diff :web@1 {second}")).text().contains("0 B"), "{second}");
    }
    about(&place, "switch :web ./vms:@1").text();
    about(&place, "export -q :web@2 --since ./vms:web@1 web.sapwood").text();
    about(&place, "rename :web@2 ./vms:web@two").text();
    about(&place, "rename :web@two @three").text();
    about(&place, "rename :web :www").text();
    assert!(about(&place, "show :www@three").text().contains("www@three"));
    for line in [
        "diff :www@1 other:www@three",
        "switch :www other:@1",
        "export :www@three --since other:www@1 file",
        "rename :www other:web",
        "rename :www@1 other:www@one",
    ] {
        about(&place, line).fails(1, &["other:", "another store than vms"]);
    }
    assert!(!place.exists("file"));
}

#[test]
fn an_archive_that_was_cut_off_is_no_raw_disk() {
    let place = place();
    about(&place, "import -q -f raw disk.raw :web@1").text();
    about(&place, "export -q :web@1 web.sapwood").text();
    let whole = place.bytes("web.sapwood");
    let mut damaged = whole.clone();
    damaged[100] ^= 1;
    for (bytes, why) in [
        (&whole[..whole.len() - 1000], "cut off"),
        (&whole[..10], "cut off"),
        (&damaged[..], "archive header"),
    ] {
        fs::write(place.path("cut.sapwood"), bytes).unwrap();
        let answer = about(&place, "import cut.sapwood :cut");
        assert!(!answer.stderr.contains("-f raw"), "{answer:?}");
        answer.fails(1, &["cut.sapwood", why]);
    }
    fs::write(place.path("other"), vec![1; 8192]).unwrap();
    about(&place, "import other :cut").fails(1, &["other", "-f raw"]);
}

#[test]
fn the_files_of_a_store_are_private() {
    let place = Place::new();
    place.raw_disk("disk.raw");
    let sapwood = |line: &str| {
        let mut command = place.command("sh", "-c");
        command.arg(format!("umask 022; exec \"$0\" {line}")).arg(crate::harness::SAPWOOD);
        Answer::of(command.output().unwrap()).text()
    };
    sapwood("store init vms");
    sapwood("import -f raw disk.raw vms:disk");
    sapwood("create vms:web 1M");
    sapwood("snapshot vms:web@1");
    let mut folders = vec![place.path("vms")];
    let mut count = 0;
    while let Some(folder) = folders.pop() {
        assert_eq!(folder.metadata().unwrap().permissions().mode() & 0o077, 0, "{}", folder.display());
        for entry in fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            let metadata = path.metadata().unwrap();
            assert_eq!(metadata.permissions().mode() & 0o077, 0, "{}", path.display());
            count += 1;
            folders.extend(metadata.is_dir().then_some(path));
        }
    }
    assert!(count > 5, "{count}");
}

#[test]
fn one_process_has_a_store() {
    let place = place();
    about(&place, "create :web 1M").text();
    let (server, line) = crate::serve::Server::start(&place, "vms:web --queues 2");
    assert_eq!(line, "Serving vms:web (volume, 1 MiB) at socket with 2 queues\n");
    // Nobody answers for it.
    about(&place, "list vms").fails(1, &["vms", "in use by process", "serve"]);
    place.sapwood("daemon --store vms").fails(1, &["vms", "in use by process"]);
    // A command waits a little: it may be a daemon that begins, or a command that ends.
    let waiting = thread::scope(|scope| {
        let waiting = scope.spawn(|| about(&place, "list vms"));
        thread::sleep(Duration::from_millis(500));
        server.stops();
        waiting.join().unwrap()
    });
    waiting.text();
    let (daemon, _) = Daemon::start(&place, "--store vms");
    place.sapwood("daemon --store vms").fails(1, &["vms", "in use by process", "daemon"]);
    place.sapwood("serve vms:web --socket other").fails(1, &["use sapwood attach"]);
    daemon.stops();
    about(&place, "attach :web").fails(1, &["start sapwood daemon"]);
    place.sapwood("store init vms").fails(1, &["there is a store already"]);
    place.sapwood("store init .").fails(1, &["not empty"]);
}

#[test]
fn scrub_names_what_a_flipped_bit_touches() {
    let place = place();
    let mut rng = sapwood_tests::sim::rng::Rng::new(1);
    let bytes: Vec<u8> = (0..1 << 17).flat_map(|_| rng.below(u64::MAX).to_le_bytes()).collect();
    fs::write(place.path("random.raw"), &bytes).unwrap();
    about(&place, "import -f raw random.raw :disk").text();
    about(&place, "clone :disk@imported copy").text();
    about(&place, "import -f raw disk.raw :other").text();
    let packs = fs::read_dir(place.path("vms/packs")).unwrap().map(|entry| entry.unwrap().path());
    let largest = packs.max_by_key(|path| path.metadata().unwrap().len()).unwrap();
    let name = format!("vms/packs/{}", largest.file_name().unwrap().to_str().unwrap());
    let whole = place.bytes(&name);
    place.damage(&name, 500_000, &[whole[500_000] ^ 1]);
    let found = about(&place, "store scrub --output=json vms");
    assert_eq!(found.code, 2, "{found:?}");
    let found: Value = serde_json::from_str(&found.stdout).unwrap();
    let touched: Vec<&str> =
        found["touched"].as_array().unwrap().iter().map(|one| one["name"].as_str().unwrap()).collect();
    assert_eq!(touched, ["copy", "disk", "disk@imported"], "{found}");
    let lost = found["touched"][2]["ranges"][0]["length"].as_u64().unwrap();
    assert!((4096..=128 << 10).contains(&lost), "{found}");
    let (daemon, _) = Daemon::start(&place, "--store vms --no-background");
    let served = about(&place, "store scrub vms");
    assert_eq!(served.code, 2, "{served:?}");
    assert!(served.stdout.contains("touched: disk@imported: "), "{served:?}");
    let log = daemon.stops();
    assert!(log.contains("disk@imported cannot be read everywhere"), "{log}");
    place.damage(&name, 500_000, &whole[500_000..=500_000]);
    about(&place, "store scrub vms").text();
}

/// All snapshots of a store, with their ids, in JSON.
fn snapshots_in(place: &Place, store: &str) -> Vec<Value> {
    let tree = place.sapwood(&format!("tree --output=json {store}")).json();
    let entries = tree["entries"].as_array().unwrap().iter().filter(|entry| entry["state"] != "volume");
    entries.cloned().collect()
}

#[test]
fn a_backup_is_a_store_with_the_same_snapshots() {
    let place = place();
    let imported = about(&place, "import --output=json -f raw disk.raw :disk").json();
    about(&place, "snapshot :disk@later").text();
    about(&place, "clone :disk@later other").text();
    for is_served in [false, true] {
        let daemon = is_served.then(|| Daemon::start(&place, "--store vms --no-background").0);
        let (copy, file) = (format!("copy-{is_served}"), format!("{is_served}.sapwood"));
        if is_served {
            about(&place, "attach :other").text();
        }
        let answer = place.sapwood(&format!("store backup --output=json --store vms {copy}")).json();
        assert_eq!(answer["path"], place.path(&copy).to_str().unwrap());
        assert!(answer["bytes"].as_u64().unwrap() >= 20 << 10, "{answer}");
        // To attach it has made it a layer of its own.
        let without: &[&str] = if is_served { &["other"] } else { &[] };
        assert_eq!(answer["without-heads"], json!(without));
        assert_eq!(snapshots_in(&place, &copy).len(), 2);
        assert_eq!(snapshots_in(&place, &copy), snapshots_in(&place, "vms"));
        place.sapwood(&format!("store check {copy}")).text();
        place.sapwood(&format!("store scrub {copy}")).text();
        let log = daemon.map(Daemon::stops);
        assert!(log.is_none_or(|log| log.contains("the store is copied to ")));
        let exported = place.sapwood(&format!("export --output=json {copy}:disk@imported {file}")).json();
        assert_eq!(exported["hash"], imported["hash"]);
        // Elsewhere the archive is the disk.
        let fresh = format!("fresh-{is_served}");
        place.sapwood(&format!("store init {fresh}")).text();
        place.sapwood(&format!("import {file} {fresh}:disk")).text();
        let (daemon, _) = Daemon::start(&place, &format!("--store {fresh} --no-background"));
        place.sapwood(&format!("attach {fresh}:disk@imported --socket socket")).text();
        assert!(crate::daemon::contents(&place, "socket", 8 << 20) == place.bytes("disk.raw"));
        daemon.stops();
    }
}

#[test]
fn many_clones_are_listed_and_served() {
    let place = place();
    about(&place, "create :base 1M").text();
    about(&place, "snapshot :base@s").text();
    let names: Vec<String> = (0..3000).map(|n| format!("clone-{n:05}-{}", "x".repeat(60))).collect();
    about(&place, &format!("clone -q :base@s {}", names[..1500].join(" "))).text();
    let (daemon, _) = Daemon::start(&place, "--store vms");
    // A request has at most 64 KiB: as many as fit.
    for names in names[1500..].chunks(500) {
        about(&place, &format!("clone -q :base@s {}", names.join(" "))).text();
    }
    let all = about(&place, "list --output=json vms").json();
    let listed: Vec<&str> =
        all.as_array().unwrap().iter().map(|entry| entry["name"].as_str().unwrap()).collect();
    assert_eq!(listed.len(), 3001, "more than a MiB of it");
    assert_eq!(listed[1..], names);
    assert_eq!(about(&place, "tree vms").text().lines().count(), 3003);
    daemon.stops();
}

#[test]
fn json_says_what_the_text_says() {
    let place = place();
    about(&place, "create :web 1M").text();
    about(&place, "snapshot :web@one").text();
    about(&place, "label :web@one a=b").text();
    let shown = about(&place, "show --output=json :web@one").json();
    let expected = json!({
        "name": "web@one", "state": "bare", "parent": null, "virtual-size": 1 << 20,
        "protected": false, "description": "", "labels": { "a": "b" },
        "exclusive-bytes": null, "shared-bytes": null, "space-ms": null,
    });
    for (field, value) in expected.as_object().unwrap() {
        assert_eq!(&shown[field], value, "{field}");
    }
    let tree = about(&place, "tree --output=json vms").json();
    let names: Vec<&Value> = tree["entries"].as_array().unwrap().iter().map(|entry| &entry["name"]).collect();
    assert_eq!(names, ["web@one", "web"]);
    assert_eq!(tree["nameless"], 0);
}
