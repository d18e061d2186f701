use std::cell::RefCell;
use std::collections::{HashMap, HashSet};
use std::fs;
use std::thread;

use candle_core::Device;
use serde_json::Value;

use super::*;

fn golden() -> Value {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/mining.json");
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

/// A folder with the pairs and the corpus of the golden, and an encoder that looks up their embeddings.
struct Fixture {
    folder: tempfile::TempDir,
    embeddings: HashMap<String, Vec<f32>>,
    /// Number of texts of each call of the encoder.
    encoded: RefCell<Vec<usize>>,
}

impl Fixture {
    fn new(golden: &Value) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let pairs = golden["pairs"].as_array().unwrap().iter();
        let pairs = pairs.map(|pair| format!("{}\n", json!({"query": pair[0], "positive": pair[1]})));
        fs::write(folder.path().join("pairs.jsonl"), pairs.collect::<String>()).unwrap();
        let corpus: Vec<String> = serde_json::from_value(golden["corpus"].clone()).unwrap();
        fs::write(folder.path().join("corpus.txt"), corpus.join("\n")).unwrap();
        let embeddings = serde_json::from_value(golden["embeddings"].clone()).unwrap();
        Self { folder, embeddings, encoded: RefCell::default() }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn inputs(&self, corpus: bool) -> Inputs {
        let searched = self.path("corpus.txt");
        Inputs::read(&self.path("pairs.jsonl"), corpus.then_some(&searched), self.folder.path()).unwrap()
    }

    fn mine(&self, filter: Filter) -> Miner {
        Miner {
            filter,
            scores: false,
            output: self.path("out.jsonl"),
            work: self.path("work"),
            keep_embeddings: false,
        }
    }

    fn encode(&self, texts: &[String]) -> Result<Tensor> {
        let rows: Vec<f32> = texts.iter().flat_map(|text| self.embeddings[text].clone()).collect();
        Ok(Tensor::from_vec(rows, (texts.len(), 16), &Device::Cpu)?)
    }

    fn run(&self, mine: &Miner, corpus: bool) -> MiningStats {
        let encode = |texts: &[String], _| {
            self.encoded.borrow_mut().push(texts.len());
            self.encode(texts)
        };
        mine.run(&self.inputs(corpus), "lookup", &World::solo(), encode).unwrap()
    }

    /// [query, positive, negatives, scores] of the written rows.
    fn rows(&self) -> Vec<Value> {
        let text = fs::read_to_string(self.path("out.jsonl")).unwrap();
        let rows = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
        rows.map(|row| json!([row["query"], row["positive"], row["negatives"], row["scores"]])).collect()
    }
}

fn filter(settings: &Value) -> Filter {
    let number = |name: &str| settings[name].as_f64().map(|number| number as f32);
    let count = |name: &str| settings[name].as_u64().map(|number| number as usize);
    Filter {
        negatives: count("num_negatives").unwrap_or(3),
        range_min: count("range_min").unwrap_or(0),
        range_max: count("range_max"),
        absolute_margin: number("absolute_margin"),
        relative_margin: number("relative_margin"),
        min_score: number("min_score"),
        max_score: number("max_score"),
        sampling: if settings["sampling_strategy"] == "random" { Sampling::Random } else { Sampling::Top },
        seed: 42,
        include_positives: settings["include_positives"] == true,
    }
}

#[test]
fn negatives_are_those_of_sentence_transformers_for_every_parameter() {
    let golden = golden();
    let world = Fixture::new(&golden);
    let (mut random, mut fewer, mut included) = (0, 0, 0);
    for case in golden["cases"].as_array().unwrap() {
        let filter = filter(&case["settings"]);
        let mine = Miner { scores: true, ..world.mine(filter.clone()) };
        let counts = world.run(&mine, case["corpus"].as_bool().unwrap());
        let (mut rows, expected) = (world.rows(), case["rows"].as_array().unwrap());
        assert_eq!(rows.len() as u64, counts.rows);
        fewer += counts.rows_with_fewer + counts.pairs_without;
        if filter.include_positives {
            // mine_hard_negatives then writes only rows with the requested number of negatives.
            rows.retain(|row| row[2].as_array().unwrap().len() == filter.negatives);
            included += rows.iter().filter(|row| row[2].as_array().unwrap().contains(&row[1])).count();
        }
        if filter.sampling == Sampling::Top {
            assert_eq!(rows.len(), expected.len(), "{}", case["settings"]);
            for (row, expected) in rows.iter().zip(expected) {
                assert_eq!(
                    row.as_array().unwrap()[..3],
                    expected.as_array().unwrap()[..3],
                    "{}",
                    case["settings"]
                );
                let [scores, expected] = [row, expected].map(|row| row[3].as_array().unwrap());
                assert_eq!(scores.len(), expected.len());
                for (score, expected) in scores.iter().zip(expected) {
                    assert!((score.as_f64().unwrap() - expected.as_f64().unwrap()).abs() < 1e-6, "{row}");
                }
            }
            continue;
        }
        assert_eq!(rows.len(), expected.len());
        for (row, all) in rows.iter().zip(expected) {
            assert_eq!((&row[0], &row[1]), (&all[0], &all[1]));
            let (drawn, all) = (row[2].as_array().unwrap(), all[2].as_array().unwrap());
            assert_eq!(drawn.len(), filter.negatives.min(all.len()));
            // By descending score, without duplicates.
            let places: Vec<_> =
                drawn.iter().map(|text| all.iter().position(|other| other == text)).collect();
            assert!(places.iter().all(Option::is_some) && places.is_sorted_by(|a, b| a < b), "{places:?}");
            random += usize::from(drawn[..] != all[..drawn.len()]);
        }
    }
    assert!(random > 20, "few random choices differ from the best: {random}");
    assert!(fewer > 50, "few rows have too few negatives: {fewer}");
    assert!(included > 20, "few positives are in their rankings: {included}");
    assert_eq!(fs::read_dir(world.folder.path()).unwrap().count(), 3, "only the output remains");
}

#[test]
fn every_candidate_is_counted_once() {
    let golden = golden();
    let world = Fixture::new(&golden);
    let settings = json!({
        "num_negatives": 4, "absolute_margin": 0.1, "relative_margin": 0.3, "max_score": 0.5, "min_score": 0.3,
        "range_min": 2, "range_max": 8,
    });
    let counts = world.run(&world.mine(filter(&settings)), true);
    let json = counts.json();
    let rows = world.rows();
    // Number of negatives of each query, counted once.
    let mut taken: Vec<_> =
        rows.iter().map(|row| (row[0].to_string(), row[2].as_array().unwrap().len())).collect();
    taken.dedup();
    let taken: usize = taken.iter().map(|(_, count)| count).sum();
    let left = counts.candidates
        - ["positive", "absolute_margin", "relative_margin", "max_score", "min_score", "range"]
            .map(|reason| json["dropped"][reason].as_u64().unwrap())
            .iter()
            .sum::<u64>();
    assert!(left as usize >= taken && taken > 0, "{json}");
    let distinct: HashSet<_> =
        golden["pairs"].as_array().unwrap().iter().map(|pair| pair[0].as_str()).collect();
    assert_eq!(json["queries"], distinct.len());
    let negatives: usize = rows.iter().map(|row| row[2].as_array().unwrap().len()).sum();
    assert_eq!(json["negatives"], negatives);
    let all = golden["pairs"].as_array().unwrap().iter().collect::<HashSet<_>>().len() as u64;
    assert_eq!(counts.rows + counts.pairs_without, all, "each pair is written or counted");
    assert!(json["negative_scores"]["max"].as_f64().unwrap() <= 0.5);
    assert!(json["negative_scores"]["min"].as_f64().unwrap() >= 0.3);
    assert!(json["differences"]["min"].as_f64().unwrap() >= 0.1);
}

#[test]
fn a_resumed_run_skips_what_is_finished() {
    let golden = golden();
    let world = Fixture::new(&golden);
    let mine = Miner { keep_embeddings: true, ..world.mine(filter(&json!({"range_min": 1}))) };
    let counts = world.run(&mine, true);
    let (rows, encoded) = (world.rows(), world.encoded.take());
    assert_eq!(encoded.len(), 2);
    // Other settings use the same embeddings; another corpus does not.
    world.run(&Miner { filter: filter(&json!({"num_negatives": 1})), ..mine.clone() }, true);
    assert!(world.encoded.take().is_empty());
    world.run(&mine, false);
    assert_eq!(world.encoded.take().len(), 2);

    // A run that ended after its only block, before its rows were joined: another text in the block shows
    // that it is taken.
    let kept =
        |names: &Path| fs::read_dir(names).unwrap().map(|entry| entry.unwrap().path()).collect::<Vec<_>>();
    let embeddings = kept(&world.path("work"));
    assert!(embeddings.len() == 2, "{embeddings:?}");
    let inputs = world.inputs(true);
    let name = |path: &Path| path.file_name().unwrap().to_string_lossy().into_owned();
    let digests = (xxh3_64(b"lookup"), inputs.queries.digest(), inputs.documents.digest());
    let texts = xxh3_64(format!("{digests:x?}").as_bytes());
    assert!(embeddings.iter().any(|path| name(path) == format!("embeddings-{texts:016x}")));
    let settings = xxh3_64(mine.settings(&inputs).as_bytes());
    let work = WorkDir::open(&mine.work, texts, settings, &World::solo()).unwrap();
    work.write_block(0, b"{\"query\":1,\"positive\":2,\"negatives\":3}\n", &counts).unwrap();
    let same = |again: MiningStats| again.rows == counts.rows && again.dropped == counts.dropped;
    assert!(same(world.run(&mine, true)));
    assert_eq!(world.rows(), [json!([1, 2, 3, null])]);
    assert!(same(world.run(&mine, true)));
    assert_eq!(world.rows(), rows, "finished rows are used only once");

    // A missing shard of embeddings is computed again.
    fs::remove_file(work.shard("documents", 0)).unwrap();
    world.encoded.take();
    assert!(same(world.run(&mine, true)));
    assert_eq!(world.encoded.take(), [inputs.documents.len()]);
    assert_eq!(world.rows(), rows);
}

#[test]
fn several_ranks_write_the_same_rows_as_one() {
    let golden = golden();
    let one = Fixture::new(&golden);
    // More queries than the 256 of a block, with shifted embeddings.
    let mut embeddings = one.embeddings.clone();
    let mut pairs = String::new();
    for copy in 0..30 {
        for pair in golden["pairs"].as_array().unwrap() {
            let (query, positive) =
                (format!("{}-{copy}", pair[0].as_str().unwrap()), pair[1].as_str().unwrap());
            let mut embedding = one.embeddings[pair[0].as_str().unwrap()].clone();
            embedding[copy % 16] += 3.0 * copy as f32;
            embeddings.insert(query.clone(), embedding);
            pairs.push_str(&format!("{}\n", json!({"query": query, "positive": positive})));
        }
    }
    let one = Fixture { embeddings, ..one };
    fs::write(one.path("pairs.jsonl"), pairs).unwrap();
    let settings = filter(&json!({"relative_margin": 0.05, "num_negatives": 5}));
    let counts = one.run(&one.mine(settings.clone()), true);
    let rows = fs::read(one.path("out.jsonl")).unwrap();
    assert!(counts.queries > 1000, "several blocks");
    for ranks in [2, 3, 7] {
        let found: Vec<MiningStats> = thread::scope(|scope| {
            let handles: Vec<_> = World::threads(ranks)
                .into_iter()
                .map(|world| {
                    let (inputs, mine, embeddings) =
                        (one.inputs(true), one.mine(settings.clone()), &one.embeddings);
                    scope.spawn(move || {
                        let encode = |texts: &[String], _| {
                            let rows: Vec<f32> =
                                texts.iter().flat_map(|text| embeddings[text].clone()).collect();
                            Ok(Tensor::from_vec(rows, (texts.len(), 16), &Device::Cpu)?)
                        };
                        mine.run(&inputs, "lookup", &world, encode).unwrap()
                    })
                })
                .collect();
            handles.into_iter().map(|handle| handle.join().unwrap()).collect()
        });
        assert!(found[0].rows == counts.rows && found[0].dropped == counts.dropped);
        assert_eq!(fs::read(one.path("out.jsonl")).unwrap(), rows);
    }
}

#[test]
fn an_embedding_that_is_not_finite_is_named() {
    let golden = golden();
    let world = Fixture::new(&golden);
    let encode = |texts: &[String], _| {
        let rows = texts.iter().map(|text| if text == "d7" { f32::NAN } else { 1.0 }).collect();
        Ok(Tensor::from_vec(rows, (texts.len(), 1), &Device::Cpu)?)
    };
    let mine = world.mine(filter(&json!({})));
    let error = mine.run(&world.inputs(true), "lookup", &World::solo(), encode).unwrap_err();
    assert_eq!(error.to_string(), "the model's embedding of `d7` is not finite");
    assert!(!world.path("out.jsonl").exists());
}
