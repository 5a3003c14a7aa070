-- wrk -s wrk.lua URL -- HEAD BODY PREFIX [SIGNATURES]
--
-- POSTs a body again and again, with another id each time. HEAD and BODY are files: the header lines, and the body with
-- thirty-six @ where the id goes. An id is PREFIX (twenty-four characters) and a running number. SIGNATURES is a file
-- with a line for each request, which goes where HEAD has @SIGNATURE@. One thread (-t 1). At the end a line of JSON.

local threads = {}
local HOLE = string.rep("@", 36)

function setup(thread)
   table.insert(threads, thread)
end

local function read(path)
   local file = assert(io.open(path, "rb"))
   local text = file:read("*a")
   file:close()
   return text
end

-- The two parts beside `hole`.
local function cut(text, hole)
   local first, last = text:find(hole, 1, true)
   if not first then
      return text, ""
   end
   return text:sub(1, first - 1), text:sub(last + 1)
end

function init(args)
   local body = read(args[2])
   local path = args[0]:match("^%w+://[^/]*(/.*)$")
   local host = args[0]:match("^%w+://([^/]*)")
   local lines = "POST " .. path .. " HTTP/1.1\r\nHost: " .. host .. "\r\nContent-Length: " .. #body .. "\r\n"
      .. read(args[1]) .. "\r\n"
   before, after = cut(lines, "@SIGNATURE@")
   start, rest = cut(body, HOLE)
   prefix = args[3]
   signatures = args[4] and io.lines(args[4])
   issued, unsigned = 0, 0
end

function request()
   issued = issued + 1
   local id = prefix .. string.format("%012x", issued)
   if not signatures then
      return before .. start .. id .. rest
   end
   local signature = signatures()
   if not signature then
      signatures = function() return "none" end
      unsigned = 1
      signature = "none"
   end
   return before .. signature .. after .. start .. id .. rest
end

function done(summary, latency)
   local sent, lacking = 0, 0
   for _, thread in ipairs(threads) do
      sent = sent + thread:get("issued")
      lacking = lacking + thread:get("unsigned")
   end
   local errors = summary.errors
   io.write(string.format(
      '\n{"issued":%d,"answered":%d,"seconds":%.6f,"p50":%.1f,"p99":%.1f,"refused":%d,"broken":%d,"unsigned":%d}\n',
      sent, summary.requests, summary.duration / 1e6, latency:percentile(50), latency:percentile(99), errors.status,
      errors.connect + errors.read + errors.write + errors.timeout, lacking))
end
