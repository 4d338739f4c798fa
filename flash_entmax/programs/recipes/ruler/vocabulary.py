"""Common English words, of which pairs are made: any adjective goes with any noun."""

ADJECTIVES = """
able amber ancient arctic autumn awake bare basic bitter blank blue bold brave brief bright brisk broad broken bronze
brown busy calm careful central cheap chief civil clean clear clever close cloudy coarse cold common cool copper coral
cosy crisp curious curved daily damp dark dear deep dense distant double dry dull dusty early eager eastern easy
elder empty equal even exact faint fair famous fast fine firm flat fond fresh frozen full gentle giant glad golden
grand grave great green grey half handy happy hard heavy hidden hollow honest huge humble idle inner iron ivory joint
keen kind large late lazy lean light little lively local lone long loose loud lucky lunar mature merry mild misty
modern modest narrow neat new noble noisy northern novel odd old olive open outer pale patient plain polar polite poor
proud purple quick quiet rapid rare raw ready red rich rigid ripe rough round royal rural rusty safe salty scarlet
secret sharp short shy silent silver simple sleepy slim slow small smooth soft solar solid southern spare square stable
steady steep still strange strong sudden sunny sweet swift tall tame tender thick thin tidy tiny tired upper urban vast
vivid warm weary western wet white whole wide wild wise wooden yellow young
"""

NOUNS = """
acorn anchor apple apron arrow attic autumn badger bakery balcony barn barrel basin basket beach bell bench berry bird
blanket boat bottle bowl branch bread brick bridge brook brush bucket button cabin cable camel candle canyon carpet
castle cat cave cellar chair chalk cherry chest circus clock cloud coat coin compass cottage cradle crane creek crow
crown curtain dairy desert desk dolphin door dragon drawer drum eagle engine falcon farm feather fence ferry field
flag flower flute forest fork fountain fox garden gate ghost glacier glove goat grape guitar hammer harbor hat hawk
hedge helmet hill horse hotel house island jacket jar jungle kettle key kitchen kite ladder lake lamp lantern leaf
lemon library lion lock magnet mango map market meadow mill mirror mitten monkey moon mountain museum needle nest
oak oar ocean office onion orchard otter oven owl paddle page paint palace panda parrot pebble pencil pepper piano
pigeon pillow pine pipe planet plum pocket pond pony potato pump puppet quarry rabbit radio rail raven ribbon river
road robin rocket roof rope rose sail salmon saddle scarf school shell ship shoe shovel spider spoon stable stair
station stone stove street sugar swan table teapot temple tent ticket tiger tower train tree trumpet tunnel turtle
valley violin wagon wallet walnut watch wheel whistle willow window wolf yard zebra
"""
