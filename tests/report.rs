//! The report of a run, in a browser; the comparison of two models.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};
use tests::{golden, golden_json, metrics, program, stderr, write_config};

/// Ten steps on the golden rows with hostile names and texts, evaluated before and after.
fn run(place: &Path, name: &str, rate: f64) -> PathBuf {
    let model = golden("bert");
    let rows = place.join("rows.jsonl");
    let text = fs::read_to_string(model.join("rows.jsonl")).unwrap();
    // Without escaping, the first query would end the script element that holds it.
    let mut lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    lines[0]["query"] = json!(format!("{HOSTILE} {}", lines[0]["query"].as_str().unwrap()));
    let text: String = lines.iter().map(|line| format!("{line}\n")).collect();
    fs::write(&rows, text).unwrap();
    let folder = place.join(name);
    fs::create_dir(&folder).unwrap();
    let mut config = tests::config(&model, &rows, &folder.join("out"));
    config["name"] = json!(format!("{name} {HOSTILE}"));
    let set = |name: &str, from: u64| json!({"name": name, "path": rows, "samples": from});
    // Rows that are in both sets meet in a batch.
    config["data"] =
        json!({"train": [set("one", 30), set("two", 20)], "negatives": 1, "no_duplicates": false});
    config["loss"]["mask_known_positives"] = json!(true);
    config["training"]["batch_size"] = json!(20);
    config["training"]["epochs"] = json!(4);
    config["training"]["max_steps"] = json!(10);
    config["training"]["learning_rate"] = json!(rate);
    config["evaluation"] = json!({"every": 4, "sets": [
        {"name": "NanoRows", "path": rows, "kind": "retrieval"},
        {"name": "triplets", "path": rows, "kind": "triplet"},
    ]});
    config["logging"]["tensorboard"] = json!(true);
    let output = program("trainer").arg("train").arg(write_config(&folder, &config)).output().unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
    folder.join("out")
}

const HOSTILE: &str = "</script><script>document.title='taken'</script><b>&amp;";

/// A browser that can run headless, if one is installed.
fn browser() -> Option<String> {
    let names = ["chromium", "chromium-browser", "google-chrome", "google-chrome-stable"];
    let own = std::env::var("LODESTONE_BROWSER").ok();
    let found = own.into_iter().chain(names.map(str::to_owned));
    found
        .into_iter()
        .find(|name| Command::new(name).arg("--version").output().is_ok_and(|out| out.status.success()))
}

/// The DOM of a page after its scripts have run, and the messages on the console.
fn opened(browser: &str, page: &Path, profile: &Path, options: &[&str]) -> (String, String) {
    let output = Command::new(browser)
        .args([
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--enable-logging=stderr",
        ])
        .args(["--v=0", "--window-size=1200,900", "--virtual-time-budget=3000"])
        .args(options)
        .arg(format!("--user-data-dir={}", profile.display()))
        .arg("--dump-dom")
        .arg(format!("file://{}", page.display()))
        .output()
        .unwrap();
    let console = stderr(&output);
    let console: Vec<&str> = console.lines().filter(|line| line.contains("CONSOLE")).collect();
    (String::from_utf8(output.stdout).unwrap(), console.join("\n"))
}

/// A page in a frame `width` pixels wide, light or dark: the width of its content, its background and its
/// text colour.
fn seen(browser: &str, page: &Path, profile: &Path, width: u32, dark: bool) -> (u32, [String; 2]) {
    let outside = page.with_file_name("frame.html");
    let script = "setTimeout(() => {\
        const inside = document.querySelector('iframe').contentDocument;\
        const style = getComputedStyle(inside.body);\
        document.title = [inside.documentElement.scrollWidth, style.backgroundColor, style.color].join(';');\
        }, 500)";
    let frame = format!(
        "<iframe src=\"{}\" style=\"width:{width}px;height:900px;border:0\" onload=\"{script}\"></iframe>",
        page.file_name().unwrap().display()
    );
    fs::write(&outside, frame).unwrap();
    let scheme = if dark {
        "--blink-settings=preferredColorScheme=0"
    } else {
        "--blink-settings=preferredColorScheme=1"
    };
    let options = ["--allow-file-access-from-files", scheme];
    let (dom, console) = opened(browser, &outside, profile, &options);
    fs::remove_file(outside).unwrap();
    assert_eq!(console, "", "{width} wide");
    let title = dom.split("<title>").nth(1).and_then(|rest| rest.split("</title>").next());
    let title: Vec<&str> = title.unwrap_or_else(|| panic!("no title: {dom:.300}")).split(';').collect();
    (title[0].parse().unwrap(), [title[1], title[2]].map(str::to_owned))
}

#[test]
fn a_browser_shows_the_report_of_a_run() {
    let place = tempfile::tempdir().unwrap();
    let first = run(place.path(), "first", 1e-3);
    let page = first.join("report.html");
    let text = fs::read_to_string(&page).unwrap();
    // Nothing is fetched from anywhere, and no text of the run is markup.
    assert!(!text.contains("src=") && !text.contains("<link") && !text.contains("url("));
    assert!(!text.contains(HOSTILE) && text.contains("\\u003c/script>"));

    let steps: Vec<Value> = metrics(&first).into_iter().filter(|line| line.get("loss").is_some()).collect();
    assert_eq!(steps.len(), 10);
    for step in &steps {
        let of = |name: &str| step["losses"][name].as_f64().unwrap_or(0.0);
        let shares: f64 =
            step["losses"].as_object().unwrap().values().map(|loss| loss.as_f64().unwrap()).sum();
        assert!(shares > 0.0 && of("one") + of("two") == shares, "{step}");
        assert!((0.0..1.0).contains(&step["masked"].as_f64().unwrap()));
    }
    assert!(steps.iter().any(|step| step["masked"].as_f64().unwrap() > 0.0));
    let samples: Value = serde_json::from_slice(&fs::read(first.join("samples.json")).unwrap()).unwrap();
    let kept: Vec<_> = samples.as_array().unwrap().iter().map(|one| one["step"].as_u64().unwrap()).collect();
    assert_eq!((kept[0], kept.last().copied()), (0, Some(10)));

    let Some(browser) = browser() else {
        println!("skipped: the report in a browser (no chromium; LODESTONE_BROWSER names one)");
        return;
    };
    let profile = place.path().join("profile");
    let (dom, console) = opened(&browser, &page, &profile, &[]);
    assert_eq!(console, "", "the console is empty");
    assert!(dom.contains("<title>first &lt;/script&gt;"), "the name is text");
    for title in [
        ">Loss<",
        ">Loss of each data set<",
        ">Gradient norm before clipping<",
        ">Learning rate<",
        ">Tokens per second<",
        ">Fraction of candidates masked as known positives<",
        ">cosine_ndcg@10<",
        ">max_accuracy<",
        ">cosine_map@100<",
    ] {
        assert!(dom.contains(title), "no chart {title}");
    }
    // Every line has as many points as the run has steps or evaluations.
    let points = |n: usize| {
        dom.split(" d=\"M")
            .skip(1)
            .filter(|d| d.split('"').next().unwrap().matches('L').count() + 1 == n)
            .count()
    };
    assert!(points(10) >= 5, "{} lines of ten steps", points(10));
    // After steps 0, 4, 8 and 10: 15 metrics of a set and of the Nano mean, 5 of triplets.
    assert_eq!(points(4), 35);
    assert!(dom.contains("NanoBEIR_<wbr>mean_<wbr>cosine_<wbr>ndcg@10"));
    assert!(dom.contains("class=\"relevant\"") && dom.contains("class=\"cosine\""), "examples are shown");
    assert!(dom.contains(">best</text>"), "the best step is marked");
    for fact in [">wall time<", ">parameters<", ">peak memory<", ">started<"] {
        assert!(dom.contains(fact), "no {fact}");
    }
    let shown = dom.split("<script").next().unwrap();
    assert!(shown.contains("after step 10") && !shown.contains("NaN") && !shown.contains("undefined"));

    let mut paint = Vec::new();
    for (width, dark) in [(400, false), (400, true), (1200, true), (1200, false)] {
        let (content, colours) = seen(&browser, &page, &profile, width, dark);
        assert!(content <= width, "{content} of {width} pixels: the page must be moved sideways");
        paint.push(colours);
    }
    assert!(paint[0] == paint[3] && paint[1] == paint[2], "{paint:?}");
    assert!(paint[0][0] != paint[1][0] && paint[0][1] != paint[1][1], "dark is as light: {paint:?}");

    // Two runs in one page, of which one has a truncated last line and a loss that is null.
    let second = run(place.path(), "second", 1e-2);
    let lines = fs::read_to_string(second.join("metrics.jsonl")).unwrap();
    let mut lines: Vec<Value> = lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    lines[3]["loss"] = Value::Null;
    let torn: String = lines.iter().map(|line| format!("{line}\n")).collect::<String>() + "{\"step\":11,\"lo";
    fs::write(second.join("metrics.jsonl"), torn).unwrap();
    let report = |options: &[&str]| {
        let mut command = program("trainer");
        command.current_dir(place.path()).arg("report").arg(&first).arg(&second).args(options);
        let output = command.output().unwrap();
        assert!(output.status.success(), "{}", stderr(&output));
        place.path().join(String::from_utf8_lossy(&output.stdout).trim())
    };
    assert_eq!(report(&[]), place.path().join("report.html"));
    let page = report(&["--output", "both.html"]);
    assert_eq!(page, place.path().join("both.html"));
    let (dom, console) = opened(&browser, &page, &profile, &[]);
    assert_eq!(console, "");
    assert!(dom.contains("second &lt;/script&gt;"));
    assert!(dom.contains("<wbr>learning_<wbr>rate</th>"), "the key that differs is named");
    let pens = dom.matches(" d=\"M").count();
    let broken =
        dom.split(" d=\"").skip(1).filter(|d| d.split('"').next().unwrap().matches('M').count() == 2).count();
    assert!(pens > 70 && broken == 1, "{pens} lines, {broken} with a gap");
}

#[test]
fn a_run_that_got_worse_says_so() {
    let place = tempfile::tempdir().unwrap();
    let output = place.path().join("out");
    fs::create_dir(&output).unwrap();
    let rows = golden("bert").join("rows.jsonl");
    let mut config = tests::config(&golden("bert"), &rows, &output);
    config["evaluation"] = json!({"metric": "loss", "sets": [{"name": "dev", "path": rows, "kind": "loss"}]});
    fs::write(output.join("config.yaml"), config.to_string()).unwrap();
    let lines = |after: f64| {
        let lines = [
            json!({"step": 0, "eval": {"dev_loss": 0.5}}),
            json!({"step": 1, "loss": 1.0}),
            json!({"step": 1, "eval": {"dev_loss": after}}),
        ];
        lines.map(|line| format!("{line}\n")).concat()
    };
    let Some(browser) = browser() else {
        println!("skipped: the report in a browser (no chromium; LODESTONE_BROWSER names one)");
        return;
    };
    for (after, worse) in [(0.7, true), (0.3, false)] {
        fs::write(output.join("metrics.jsonl"), lines(after)).unwrap();
        assert!(program("trainer").arg("report").arg(&output).status().unwrap().success());
        let (dom, console) =
            opened(&browser, &output.join("report.html"), &place.path().join("profile"), &[]);
        assert_eq!(console, "");
        let warning = "The trained model is worse than the base: loss rose from 0.5000 to 0.7000.";
        assert_eq!(dom.split("<script").next().unwrap().contains(warning), worse);
        assert_eq!(dom.contains("class=\"better\">−0.2000"), !worse);
    }
}

#[test]
fn a_folder_without_a_run_has_no_report() {
    let place = tempfile::tempdir().unwrap();
    let report = || program("trainer").arg("report").arg(place.path()).output().unwrap();
    for (text, expected) in [
        (None, "has no metrics.jsonl"),
        (Some(""), "has no step and no evaluation yet"),
        (Some("{\"st"), "has no step and no evaluation yet"),
        (Some("nonsense\n{\"step\":1}\n"), "metrics.jsonl:1:"),
    ] {
        if let Some(text) = text {
            fs::write(place.path().join("metrics.jsonl"), text).unwrap();
        }
        let output = report();
        assert_eq!(output.status.code(), Some(2), "{}", stderr(&output));
        assert!(stderr(&output).contains(expected), "{}", stderr(&output));
        assert!(!place.path().join("report.html").exists());
    }
    // Nothing but steps is enough.
    fs::write(place.path().join("metrics.jsonl"), "{\"step\":1,\"loss\":null}\n").unwrap();
    assert!(report().status.success());
    assert!(place.path().join("report.html").exists());
}

#[test]
fn two_models_are_compared_on_the_same_sets() {
    let place = tempfile::tempdir().unwrap();
    let tuned = run(place.path(), "tuned", 1e-2).join("model");
    let compare = |tuned: &Path, kind: &str| {
        let mut command = program("trainer");
        command.arg("compare").arg("--base").arg(golden("bert")).arg("--tuned").arg(tuned);
        command.arg("--set").arg(golden("bert").join("rows.jsonl")).args([
            "--kind",
            kind,
            "--resamples",
            "2000",
        ]);
        let output = command.arg("--output").arg(place.path()).arg("--quiet").output().unwrap();
        assert!(output.status.success(), "{}", stderr(&output));
        assert_eq!(stderr(&output), "");
        let json: Value =
            serde_json::from_slice(&fs::read(place.path().join("compare.json")).unwrap()).unwrap();
        (json, String::from_utf8(output.stdout).unwrap())
    };
    for (kind, count) in [("retrieval", 15), ("triplet", 5)] {
        let (json, table) = compare(&tuned, kind);
        let expected = &golden_json("", "metrics.json")["folder"][kind];
        assert_eq!(json["sets"]["rows"], 40);
        let lines = json["metrics"].as_object().unwrap();
        assert_eq!(lines.len(), count);
        for (name, line) in lines {
            let number = |key: &str| line[key].as_f64().unwrap();
            assert!((number("base") - expected[name].as_f64().unwrap()).abs() < 1e-6, "{name}");
            assert!((number("delta") - (number("tuned") - number("base"))).abs() < 1e-12);
            assert!(number("low") <= number("high"));
            let shown =
                format!("  {:6.4}  {:6.4}  {:+7.4}  [", number("base"), number("tuned"), number("delta"));
            let row =
                table.lines().find(|row| row.split(' ').next() == Some(&name["rows_".len()..])).unwrap();
            assert!(row.contains(&shown), "{row} {shown}");
        }
        assert!(lines.values().any(|line| line["low"].as_f64() < line["high"].as_f64()));
    }
    // A model has no difference to itself.
    let (json, table) = compare(&golden("bert"), "retrieval");
    assert!(
        json["metrics"].as_object().unwrap().values().all(|line| line["low"] == 0.0 && line["high"] == 0.0)
    );
    assert!(table.contains("[+0.0000, +0.0000]"), "{table}");

    let output = program("trainer")
        .args(["compare", "--base", "/no/such/model", "--tuned", "/no/such/model"])
        .arg("--set")
        .arg(golden("bert").join("rows.jsonl"))
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("/no/such/model"), "{}", stderr(&output));
}
