// The playground of a running server in a real browser:
//   npm install playwright-core && node playground.mjs http://127.0.0.1:8080 [screenshot.png]
// CHROMIUM names the browser if it is not /usr/bin/chromium.
import { chromium } from "playwright-core";
import assert from "node:assert";
const [url, picture] = process.argv.slice(2);
const browser = await chromium.launch({ executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium", args: ["--no-sandbox"] });
const page = await browser.newPage({ viewport: { width: 1120, height: 720 } });
const complaints = [];
page.on("pageerror", e => complaints.push(String(e)));
page.on("console", m => { if (m.type() === "error") complaints.push(m.text()); });
await page.goto(url);
await page.waitForFunction(() => document.getElementById("model").textContent.length > 1);
const say = async text => {
  await page.fill("#text", text);
  await page.press("#text", "Enter");
  await page.waitForFunction(() => document.getElementById("send").textContent === "Stop");
};
const idle = () => page.waitForFunction(() => document.getElementById("send").textContent === "Send", null, { timeout: 60000 });
await page.fill("#temperature", "0");
await page.fill("#most", "60");
await say("What is the capital of France?");
await page.waitForFunction(() => document.querySelector(".assistant p").textContent.length > 3);
await idle();
assert.match(await page.textContent(".assistant .facts"), /tokens · first after \d+ ms/);
await page.fill("#most", "400");
await say("Write a short story about a river.");
await page.waitForFunction(() => document.querySelectorAll(".assistant p")[1]?.textContent.length > 250, null, { timeout: 60000 });
await page.waitForFunction(() => Number(document.getElementById("rate").textContent) > 0, null, { timeout: 60000 });
await page.waitForFunction(() => document.getElementById("running").textContent === "1");
if (picture) await page.screenshot({ path: picture });
await page.click("#send"); // stop
await idle();
await page.waitForFunction(() => document.getElementById("running").textContent === "0", null, { timeout: 10000 });
assert.equal(complaints.length, 0, complaints.join("\n"));
await page.click("#clear");
assert.equal(await page.locator(".assistant").count(), 0);
await page.evaluate(() => { document.getElementById("temperature").value = "9"; });
await say("Too hot?");
await page.waitForSelector(".error");
assert.match(await page.textContent(".error p"), /temperature/);
console.log("the playground works");
await browser.close();
