-- List the entries of a work stream, and return the messages of those that the caller does not know.
-- KEYS: stream
-- ARGV: consumer group, max taken entries, max waiting entries, known entry...
-- Returns {{entry, consumer, unix ms of its delivery, deliveries} of taken entries, waiting entries, {entry, message} of unknown ones}.
-- requires: consumer_group
local known, new = {}, {}
for i = 4, #ARGV do known[ARGV[i]] = true end

local function add(entry)
  for i = 1, #entry[2], 2 do
    if entry[2][i] == 'm' then new[#new + 1] = {entry[1], entry[2][i + 1]} end
  end
end

local found, taken = consumer_group(), {}
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
if found then
  for _, entry in ipairs(redis.call('XPENDING', KEYS[1], ARGV[1], '-', '+', ARGV[2])) do
    taken[#taken + 1] = {entry[1], entry[2], now - entry[3], entry[4]}
    local there = not known[entry[1]] and redis.call('XRANGE', KEYS[1], entry[1], entry[1])[1]
    if there then add(there) end
  end
end

local waiting, delivered = {}, found and found['last-delivered-id'] or '0-0'
for _, entry in ipairs(redis.call('XRANGE', KEYS[1], '(' .. delivered, '+', 'COUNT', ARGV[3])) do
  waiting[#waiting + 1] = entry[1]
  if not known[entry[1]] then add(entry) end
end

return {taken, waiting, new}
